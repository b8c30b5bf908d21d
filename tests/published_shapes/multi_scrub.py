"""Removal of one sample after the other, with a row of a table for each."""

import argparse
import os
import time

import models
import numpy as np
import pandas as pd
import torch
from data_utils import getDatasets
from grad_utils import getGradObjs, gradNorm  # noqa: F401
from nn_utils import do_epoch, manual_seed
from scrub_tools import inp_perturb, scrubSample  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, Subset

parser = argparse.ArgumentParser()
parser.add_argument("--dataset", default="mnist")
parser.add_argument("--model", default="LogisticRegressor")
parser.add_argument("--train_epochs", type=int, default=8)
parser.add_argument("--orig_trainset_size", type=int, default=120)
parser.add_argument("--n_removals", type=int, default=2)
parser.add_argument("--n_perturbations", type=int, default=30)
parser.add_argument("--epsilon", type=float, default=0.1)
parser.add_argument("--delta", type=float, default=0.01)
parser.add_argument("--l2_reg", type=float, default=0.05)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--order", default="Hessian", choices=["BP", "Hessian"])
parser.add_argument("--HessType", default="Sekhari", choices=["Sekhari", "CR"])
parser.add_argument("--approxType", default="FD", choices=["FD", "Fisher"])
parser.add_argument("--selectionType", default="FOCI", choices=["Full", "FOCI", "Random", "One"])
parser.add_argument("--FOCIType", default="full", choices=["full", "cheap"])
parser.add_argument("--cheap_foci_thresh", type=float, default=0.05)
parser.add_argument("--scrub_batch_size", type=int, default=None)
parser.add_argument("--val_gap_skip", type=float, default=0.05)
parser.add_argument("--hessian_device", default="cpu")
parser.add_argument("--run", type=int, default=1)
parser.add_argument("--outfile", default="results.csv")
args = parser.parse_args()

manual_seed(args.run)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
stem = f"trained_models/{args.dataset}_{args.model}_epochs_{args.train_epochs}"
build = getattr(models, args.model)
model = build().to(device)
model.load_state_dict(torch.load(stem + ".pt"))
criterion = nn.CrossEntropyLoss()
full_dataset, val_dataset = getDatasets(name=args.dataset, val_also=True)
val_loader = DataLoader(val_dataset, batch_size=args.batch_size, shuffle=False)
with torch.no_grad():
    _, prev_val_acc = do_epoch(model, val_loader, criterion, 0, 0, optim=None, device=device)

ordering = np.random.permutation(args.orig_trainset_size)
scrubbed, done, position = [], 0, 0
while done < args.n_removals:
    scrub_list = [ordering[position]]
    position += 1
    scrub_dataset = Subset(full_dataset, scrub_list)
    scrubbed.extend(scrub_list)
    residual, _ = getDatasets(name=args.dataset, val_also=False, exclude_indices=scrubbed)
    residual_loader = DataLoader(residual, batch_size=args.batch_size, shuffle=False)
    foci_val = 1
    while foci_val > args.cheap_foci_thresh:
        torch.save(model.state_dict(), stem + "_prevSD.pt")
        optim = torch.optim.SGD(model.parameters(), lr=args.lr)
        foci_val, state, loss_before, loss_after, norm_before, norm_after = inp_perturb(
            model, scrub_dataset, criterion, args, optim, device, outString=stem
        )
        model = build().to(device)
        model.load_state_dict(state)
        with torch.no_grad():
            _, val_acc = do_epoch(model, val_loader, criterion, 0, 0, optim=None, device=device)
        bad = prev_val_acc - val_acc > args.val_gap_skip
        if bad:
            model = build().to(device)
            model.load_state_dict(torch.load(stem + "_prevSD.pt"))
        else:
            prev_val_acc = val_acc
            done += 1
        _, residual_acc, residual_norm = do_epoch(
            model, residual_loader, criterion, 0, 0, optim=None, device=device, compute_grads=True
        )
        row = {
            "scrubbee": scrub_list,
            "bad_sample": int(bad),
            "n_residual": len(residual),
            "val_acc_after": val_acc,
            "sample_loss_before": loss_before.detach().cpu().item(),
            "sample_loss_after": loss_after.detach().cpu().item(),
            "sample_gradnorm_before": norm_before,
            "sample_gradnorm_after": norm_after,
            "residual_acc_after": residual_acc,
            "residual_gradnorm_after": residual_norm,
            "time": time.time(),
        }
        new = not os.path.isfile(args.outfile)
        pd.DataFrame(row).to_csv(args.outfile, mode="a", header=new, index=False)
torch.save(model.state_dict(), stem + "_scrubbed.pt")
