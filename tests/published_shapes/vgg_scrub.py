"""Removal of the images of one identity from a network for faces."""

import argparse
import copy
import os

import models
import numpy as np
import pandas as pd
import torch
from data_utils import getDatasets
from nn_utils import do_epoch, manual_seed
from torch import nn
from torch.utils.data import DataLoader, Subset
from vgg_scrub_tools import vgg_inp_perturb
from VGGFaceDataset import VGGFaceDataset

parser = argparse.ArgumentParser()
parser.add_argument("--mode", default="scrub")
parser.add_argument("--person", default="person_1")
parser.add_argument("--train_epochs", type=int, default=4)
parser.add_argument("--orig_trainset_size", type=int, default=982803)
parser.add_argument("--n_removals", type=int, default=3)
parser.add_argument("--n_perturbations", type=int, default=5)
parser.add_argument("--epsilon", type=float, default=0.0001)
parser.add_argument("--delta", type=float, default=1.0)
parser.add_argument("--l2_reg", type=float, default=0.01)
parser.add_argument("--lr", type=float, default=0.0001)
parser.add_argument("--order", default="Hessian")
parser.add_argument("--HessType", default="Sekhari")
parser.add_argument("--approxType", default="FD")
parser.add_argument("--selectionType", default="FOCI")
parser.add_argument("--FOCIType", default="cheap")
parser.add_argument("--cheap_foci_thresh", type=float, default=0.05)
parser.add_argument("--scrub_batch_size", type=int, default=1)
parser.add_argument("--hessian_device", default="cpu")
parser.add_argument("--sec_device", default="cuda:1")
parser.add_argument("--outfile", default="vgg.csv")
args = parser.parse_args()

manual_seed(0)
with open("names.txt") as file:
    n_classes = len(file.read().split())
model, criterion = models.SmallVGG(n_classes), nn.CrossEntropyLoss()
stem = f"vggface_{args.train_epochs}"
if args.mode == "train":
    train_set, _ = getDatasets("vggface")
    loader = DataLoader(train_set, batch_size=20, shuffle=True)
    optim = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=args.l2_reg)
    for epoch in range(args.train_epochs):
        do_epoch(model, loader, criterion, epoch, args.train_epochs, optim, "cpu", stem)
    torch.save(model.state_dict(), stem + ".pt")
    raise SystemExit

model.load_state_dict(torch.load(stem + ".pt"))
scrub_set = VGGFaceDataset(attr_data_file="dled_vggface.csv", person=args.person, exclude=False)
residual_set = VGGFaceDataset(attr_data_file="dled_vggface.csv", person=args.person, exclude=True)
residual_loader = DataLoader(residual_set, batch_size=50, shuffle=False)
scrub_loader = DataLoader(scrub_set, batch_size=50, shuffle=False)
for number in np.random.permutation(len(scrub_set))[: args.n_removals]:
    request = Subset(scrub_set, [number])
    foci_val = 1
    while foci_val > args.cheap_foci_thresh:
        model_copy = copy.deepcopy(model).to(args.sec_device)
        optim = torch.optim.SGD(model.parameters(), lr=args.lr)
        foci_val, state, loss_before, loss_after, norm_before, norm_after = vgg_inp_perturb(
            model, model_copy, request, criterion, args, optim, "cpu", outString=stem
        )
        model.load_state_dict(state)
        with torch.no_grad():
            _, residual_acc = do_epoch(model, residual_loader, criterion, 0, 0)
            _, scrub_acc = do_epoch(model, scrub_loader, criterion, 0, 0)
        row = {
            "scrubbee": number,
            "residual_acc": residual_acc,
            "identity_acc": scrub_acc,
            "loss_before": loss_before.item(),
            "loss_after": loss_after.item(),
            "gradnorm_before": norm_before,
            "gradnorm_after": norm_after,
        }
        new = not os.path.isfile(args.outfile)
        pd.DataFrame([row]).to_csv(args.outfile, mode="a", header=new, index=False)
