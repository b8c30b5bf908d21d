"""Training whose last two epochs leave files, under a name with "ntp" and the seed."""

import argparse
import os

import models
import torch
from data_utils import getDatasets
from nn_utils import do_epoch, manual_seed
from torch import nn
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--dataset", default="mnist")
parser.add_argument("--model", default="LogisticRegressor")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--batch_size", type=int, default=40)
parser.add_argument("--learning_rate", type=float, default=0.1)
parser.add_argument("--weight_decay", type=float, default=0.05)
parser.add_argument("--orig_trainset_size", type=int, default=None)
parser.add_argument("--run", type=int, default=1)
args = parser.parse_args()

manual_seed(args.run)
kept = None if args.orig_trainset_size is None else list(range(args.orig_trainset_size))
train_set, val_set = getDatasets(name=args.dataset, val_also=True, include_indices=kept)
train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
val_loader = DataLoader(val_set, batch_size=args.batch_size, shuffle=False)

model = getattr(models, args.model)()
optim = torch.optim.SGD(
    model.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=args.weight_decay
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=200)
criterion = nn.CrossEntropyLoss()
os.makedirs("trained_models", exist_ok=True)
stem = f"trained_models/{args.dataset}_{args.model}_ntp_{len(train_set)}_seed_{args.run}"
for epoch in range(args.epochs):
    do_epoch(
        model,
        train_loader,
        criterion,
        epoch,
        args.epochs,
        optim=optim,
        device="cpu",
        outString=stem,
    )
    with torch.no_grad():
        loss, accuracy = do_epoch(
            model, val_loader, criterion, epoch, args.epochs, optim=None, device="cpu"
        )
    scheduler.step()
torch.save(model.state_dict(), stem + ".pt")
print(f"val_acc {accuracy:.4f}")
