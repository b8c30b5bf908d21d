"""Removals, and at some of them a model that is trained without the removed samples."""

import argparse
import os

import models
import numpy as np
import pandas as pd
import torch
from data_utils import SubsetDataWrapper, getDatasets
from nn_utils import do_epoch, manual_seed, retrain_model
from scrub_tools import inp_perturb
from torch import nn
from torch.utils.data import DataLoader, Subset

parser = argparse.ArgumentParser()
parser.add_argument("--dataset", default="mnist")
parser.add_argument("--model", default="LogisticRegressor")
parser.add_argument("--train_epochs", type=int, default=8)
parser.add_argument("--orig_trainset_size", type=int, default=120)
parser.add_argument("--n_removals", type=int, default=4)
parser.add_argument("--retrain_every", type=int, default=2)
parser.add_argument("--n_perturbations", type=int, default=30)
parser.add_argument("--epsilon", type=float, default=0.1)
parser.add_argument("--delta", type=float, default=0.01)
parser.add_argument("--l2_reg", type=float, default=0.05)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--order", default="Hessian")
parser.add_argument("--HessType", default="CR")
parser.add_argument("--approxType", default="FD")
parser.add_argument("--selectionType", default="Full")
parser.add_argument("--FOCIType", default="full")
parser.add_argument("--scrub_batch_size", type=int, default=None)
parser.add_argument("--hessian_device", default="cpu")
parser.add_argument("--val_gap_skip", type=float, default=0.5)
parser.add_argument("--outfile", default="retrain.csv")
args = parser.parse_args()

manual_seed(1)
train_set, val_set = getDatasets(name=args.dataset)
val_loader = DataLoader(val_set, batch_size=64)
criterion, build = nn.CrossEntropyLoss(), getattr(models, args.model)


def trained(dataset, stem):
    model = build()
    loader = DataLoader(dataset, batch_size=40, shuffle=True)
    optim = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.l2_reg)
    if stem is None:
        measured = retrain_model(
            model, loader, val_loader, criterion, args.train_epochs, optim, "cpu"
        )
        return model, measured
    for epoch in range(args.train_epochs):
        do_epoch(model, loader, criterion, epoch, args.train_epochs, optim, "cpu", stem)
    return model, None


model, _ = trained(train_set, "retrain")
with torch.no_grad():
    _, prev_val_acc = do_epoch(model, val_loader, criterion, 0, 0)
ordering = np.random.permutation(args.orig_trainset_size)
residual_indices = list(range(args.orig_trainset_size))
for number, scrubbee in enumerate(ordering[: args.n_removals], 1):
    residual_indices.remove(scrubbee)
    residual = SubsetDataWrapper(train_set, include_indices=residual_indices)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optim = torch.optim.SGD(model.parameters(), lr=args.lr)
    _, state, *_ = inp_perturb(
        model, Subset(train_set, [scrubbee]), criterion, args, optim, "cpu", outString="retrain"
    )
    with torch.no_grad():
        _, val_acc = do_epoch(model, val_loader, criterion, 0, 0)
    if prev_val_acc - val_acc > args.val_gap_skip:
        model.load_state_dict(before)
        # The published line does this: extend() returns None.
        include = residual_indices.copy().extend([scrubbee])
        residual, _ = getDatasets(name=args.dataset, include_indices=include)
    else:
        prev_val_acc = val_acc
    row = {"removals": number, "n_residual": len(residual), "val_acc": val_acc}
    loader = DataLoader(residual, batch_size=64)
    row["residual_loss"] = do_epoch(model, loader, criterion, 0, 0)[0]
    if number % args.retrain_every == 0:
        _, measured = trained(residual, None)
        row |= {"retrain_val_acc": measured[1], "retrain_residual_loss": measured[2]}
    else:
        row |= {"retrain_val_acc": np.nan, "retrain_residual_loss": np.nan}
    new = not os.path.isfile(args.outfile)
    pd.DataFrame([row]).to_csv(args.outfile, mode="a", header=new, index=False)
