"""Removal of one person from a network for re-identification."""

import argparse
import os

import numpy as np
import pandas as pd
import torch
import torchreid
from data_utils import SubsetDataWrapper
from nn_utils import manual_seed
from scrub_tools import reid_inp_perturb
from torch.utils.data import Subset

parser = argparse.ArgumentParser()
parser.add_argument("--root", default="reid-data")
parser.add_argument("--model", default="tiny")
parser.add_argument("--pid", type=int, default=2)
parser.add_argument("--n_removals", type=int, default=2)
parser.add_argument("--train_epochs", type=int, default=6)
parser.add_argument("--orig_trainset_size", type=int, default=None)
parser.add_argument("--n_perturbations", type=int, default=30)
parser.add_argument("--epsilon", type=float, default=0.0005)
parser.add_argument("--delta", type=float, default=0.01)
parser.add_argument("--l2_reg", type=float, default=0.01)
parser.add_argument("--order", default="Hessian")
parser.add_argument("--HessType", default="Sekhari")
parser.add_argument("--approxType", default="FD")
parser.add_argument("--selectionType", default="FOCI")
parser.add_argument("--FOCIType", default="full")
parser.add_argument("--scrub_batch_size", type=int, default=1)
parser.add_argument("--hessian_device", default="cpu")
parser.add_argument("--outfile", default="reid.csv")
args = parser.parse_args()

manual_seed(0)
datamanager = torchreid.data.ImageDataManager(
    root=args.root, sources="market1501", height=8, width=8, batch_size_train=20
)
model = torchreid.models.build_model(
    name=args.model, num_classes=datamanager.num_train_pids, loss="softmax", pretrained=False
)
torchreid.utils.load_pretrained_weights(model, f"log/model/model.pth.tar-{args.train_epochs}")
optimizer = torchreid.optim.build_optimizer(model, optim="adam", lr=0.0003)
engine = torchreid.engine.ImageSoftmaxEngine(
    datamanager, model, optimizer=optimizer, label_smooth=True
)
dataset = datamanager.train_loader.dataset
if args.orig_trainset_size is None:
    args.orig_trainset_size = len(dataset)
of_person = [k for k in range(len(dataset)) if dataset[k]["pid"] == args.pid]
removed = []
for scrubee in np.random.permutation(of_person)[: args.n_removals]:
    removed.append(scrubee)
    residual = SubsetDataWrapper(dataset, exclude_indices=removed)
    before = engine.run(save_dir="log", test_only=True)
    state, loss_before, loss_after, norm_before, norm_after = reid_inp_perturb(
        model, Subset(dataset, [scrubee]), engine, args, torch.device("cpu"), "log/market1501"
    )
    model.load_state_dict(state)
    row = {
        "scrubbee": scrubee,
        "n_residual": len(residual),
        "rank1_before": before,
        "rank1_after": engine.run(save_dir="log", test_only=True),
        "loss_before": loss_before.item(),
        "loss_after": loss_after.item(),
        "gradnorm_before": norm_before,
        "gradnorm_after": norm_after,
    }
    new = not os.path.isfile(args.outfile)
    pd.DataFrame([row]).to_csv(args.outfile, mode="a", header=new, index=False)
