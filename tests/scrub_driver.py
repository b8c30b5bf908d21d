"""Training and a run of deletions as a script for the published code makes them.

The calls, their order, the file names and the command line are those of such scripts; only the
import lines are other ones.
"""

import argparse
import os
import sys
import time

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

# From data_utils, nn_utils and scrub_tools there.
from lcodec_ext.compat.scrub import (
    SubsetDataWrapper,
    do_epoch,
    inp_perturb,
    manual_seed,
    scrubSample,  # noqa: F401, scripts import it and leave it
)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LogisticRegressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.view(-1, 64))


class Logistic2NN(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(64, 12)
        self.act1 = nn.ReLU()
        self.linear2 = nn.Linear(12, 10)

    def forward(self, x):
        return self.linear2(self.act1(self.linear1(x.view(-1, 64))))


class SmallConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(54, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


MODELS = {model.__name__: model for model in (LogisticRegressor, Logistic2NN, SmallConvNet)}


def get_datasets():
    digits = load_digits()
    images = torch.tensor(digits.images[:600] / 16, dtype=torch.float32).unsqueeze(1)
    targets = torch.tensor(digits.target[:600])
    return (
        TensorDataset(images[:400], targets[:400]),
        TensorDataset(images[400:], targets[400:]),
    )


def out_string(args):
    return (
        f"trained_models/digits_{args.model}_epochs_{args.train_epochs}_lr_{args.train_lr}"
        f"_wd_{args.train_wd}_bs_{args.train_bs}_notransform"
    )


def train(args):
    manual_seed(args.run)
    train_set, val_set = get_datasets()
    train_loader = DataLoader(train_set, batch_size=args.train_bs, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=args.batch_size, shuffle=False)
    model = MODELS[args.model]().to(device)
    optim = torch.optim.SGD(
        model.parameters(), lr=args.train_lr, momentum=0.9, weight_decay=args.train_wd
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=200)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.train_epochs):
        do_epoch(
            model,
            train_loader,
            criterion,
            epoch,
            args.train_epochs,
            optim=optim,
            device=device,
            outString=out_string(args),
        )
        with torch.no_grad():
            do_epoch(
                model,
                val_loader,
                criterion,
                epoch,
                args.train_epochs,
                optim=None,
                device=device,
                outString=out_string(args),
            )
        scheduler.step()
    torch.save(model.state_dict(), out_string(args) + ".pt")


def scrub_many(args):
    manual_seed(args.run)
    stem = out_string(args)
    row = {name: [getattr(args, name)] for name in ("model", "selectionType", "HessType", "run")}
    model = MODELS[args.model]().to(device)
    model.load_state_dict(torch.load(stem + ".pt"))
    criterion = nn.CrossEntropyLoss()
    ordering = np.random.permutation(args.orig_trainset_size)  # noqa: NPY002
    full_dataset, val_dataset = get_datasets()
    val_loader = DataLoader(val_dataset, batch_size=args.batch_size, shuffle=False)
    with torch.no_grad():
        val_loss, val_accuracy = do_epoch(
            model, val_loader, criterion, 0, 0, optim=None, device=device
        )
    row["val_acc_before"] = [val_accuracy]
    prev_val_acc = val_accuracy

    scrubbed_list = []
    i = j = 0
    while i < args.n_removals:
        if args.scrub_batch_size is not None:
            scrub_list = []
            while len(scrub_list) < args.scrub_batch_size and i + len(scrub_list) < args.n_removals:
                scrubee = ordering[j]
                if full_dataset[scrubee][1] == args.removal_class:
                    scrub_list.append(scrubee)
                j += 1
        else:
            scrub_list = [ordering[j]]
            j += 1
        scrub_dataset = Subset(full_dataset, scrub_list)
        scrubbed_list.extend(scrub_list)
        residual_dataset = SubsetDataWrapper(full_dataset, exclude_indices=scrubbed_list)
        residual_loader = DataLoader(residual_dataset, batch_size=args.batch_size, shuffle=False)
        row["scrub_list"] = [scrub_list]
        row["n_removals"] = [i]

        foci_val = 1
        while foci_val > args.cheap_foci_thresh:
            torch.save(model.state_dict(), stem + "_prevSD.pt")
            optim = torch.optim.SGD(model.parameters(), lr=args.lr)
            (foci_val, updated_sd, loss_before, loss_after, gradnorm_before, gradnorm_after) = (
                inp_perturb(model, scrub_dataset, criterion, args, optim, device, outString=stem)
            )
            model = MODELS[args.model]().to(device)
            model.load_state_dict(updated_sd)
            with torch.no_grad():
                val_loss, val_accuracy = do_epoch(
                    model, val_loader, criterion, 0, 0, optim=None, device=device
                )
            if prev_val_acc - val_accuracy > args.val_gap_skip:
                model = MODELS[args.model]().to(device)
                model.load_state_dict(torch.load(stem + "_prevSD.pt"))
                row["bad_sample"] = 1
            else:
                prev_val_acc = val_accuracy
                row["bad_sample"] = 0
                i += len(scrub_list)
            row["time"] = time.time()
            row["val_acc_after"] = [val_accuracy]
            row["val_loss_after"] = [val_loss]
            row["sample_loss_before"] = [loss_before.detach().cpu().item()]
            row["sample_loss_after"] = [loss_after.detach().cpu().item()]
            row["sample_gradnorm_before"] = [gradnorm_before]
            row["sample_gradnorm_after"] = [gradnorm_after]
            resid_loss, resid_accuracy, resid_gradnorm = do_epoch(
                model,
                residual_loader,
                criterion,
                0,
                0,
                optim=None,
                device=device,
                compute_grads=True,
            )
            row["residual_loss_after"] = [resid_loss]
            row["residual_acc_after"] = [resid_accuracy]
            row["residual_gradnorm_after"] = [resid_gradnorm]
            new = not os.path.isfile(args.outfile)
            pd.DataFrame(row).to_csv(args.outfile, mode="a", header=new, index=False)
    return model


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="scrub")
    parser.add_argument("--model", default="LogisticRegressor")
    parser.add_argument("--train_epochs", type=int, default=12)
    parser.add_argument("--n_removals", type=int, default=3)
    parser.add_argument("--orig_trainset_size", type=int, default=400)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--delta", type=float, default=0.01)
    parser.add_argument("--l2_reg", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--HessType", default="Sekhari", choices=["Sekhari", "CR"])
    parser.add_argument("--approxType", default="FD", choices=["FD", "Fisher"])
    parser.add_argument("--n_perturbations", type=int, default=60)
    parser.add_argument("--order", default="Hessian", choices=["BP", "Hessian"])
    parser.add_argument("--selectionType", default="FOCI")
    parser.add_argument("--FOCIType", default="full", choices=["full", "cheap"])
    parser.add_argument("--cheap_foci_thresh", type=float, default=0.05)
    parser.add_argument("--run", type=int, default=1)
    parser.add_argument("--outfile", default="scrub_ablate_results.csv")
    parser.add_argument("--hessian_device", default="cpu")
    parser.add_argument("--val_gap_skip", type=float, default=0.05)
    parser.add_argument("--scrub_batch_size", type=int, default=None)
    parser.add_argument("--removal_class", type=int, default=0)
    parser.add_argument("--train_lr", type=float, default=0.05)
    parser.add_argument("--train_wd", type=float, default=0.01)
    parser.add_argument("--train_bs", type=int, default=50)
    args = parser.parse_args(argv)
    if args.mode == "train":
        train(args)
        print(f"trained: {out_string(args)}.pt")
        return None
    model = scrub_many(args)
    print(f"{args.n_removals} samples removed; see {args.outfile}")
    return model


if __name__ == "__main__":
    os.makedirs("trained_models", exist_ok=True)
    main(sys.argv[1:])
