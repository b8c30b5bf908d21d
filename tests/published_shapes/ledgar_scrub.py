"""Training of a text classifier on provisions, and removals from it."""

import argparse
import json
import os

import numpy as np
import pandas as pd
import torch
from data_utils import SubsetDataWrapper
from grad_utils import getGradObjs, gradNorm
from nn_utils import do_epoch, manual_seed  # noqa: F401
from pytorch_transformers import (
    AdamW,
    DistilBertConfig,
    DistilBertModel,
    DistilBertTokenizer,
    WarmupLinearSchedule,
)
from scrub_tools import inp_perturb, scrubSample  # noqa: F401
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MultiLabelBinarizer
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="LEDGAR.jsonl")
parser.add_argument("--mode", default="train")
parser.add_argument("--train_epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_seq_length", type=int, default=12)
parser.add_argument("--weight_decay", type=float, default=0.01)
parser.add_argument("--removal_class", type=int, default=1)
parser.add_argument("--n_removals", type=int, default=2)
parser.add_argument("--n_perturbations", type=int, default=30)
parser.add_argument("--n_tokens_to_replace", type=int, default=1)
parser.add_argument("--orig_trainset_size", type=int, default=None)
parser.add_argument("--epsilon", type=float, default=0.1)
parser.add_argument("--delta", type=float, default=1.0)
parser.add_argument("--l2_reg", type=float, default=0.01)
parser.add_argument("--order", default="Hessian")
parser.add_argument("--HessType", default="Sekhari")
parser.add_argument("--approxType", default="FD")
parser.add_argument("--selectionType", default="FOCI")
parser.add_argument("--FOCIType", default="full")
parser.add_argument("--scrub_batch_size", type=int, default=None)
parser.add_argument("--hessian_device", default="cpu")
parser.add_argument("--outfile", default="ledgar.csv")
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class DistilBertForMultilabelSequenceClassification(nn.Module):
    def __init__(self, config, num_labels):
        super().__init__()
        self.distilbert = DistilBertModel(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, num_labels)
        self.dropout = nn.Dropout(config.seq_classif_dropout)

    def forward(self, input_ids, attention_mask=None, labels=None):
        state = self.distilbert(input_ids=input_ids, attention_mask=attention_mask)[0][:, 0]
        return self.classifier(self.dropout(torch.relu(self.pre_classifier(state))))


def convert(texts, targets):
    tokenizer = DistilBertTokenizer.from_pretrained("distilbert-base-uncased")
    ids = torch.zeros(len(texts), args.max_seq_length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        tokens = ["[CLS]", *tokenizer.tokenize(text)[: args.max_seq_length - 2], "[SEP]"]
        ids[row, : len(tokens)] = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
        mask[row, : len(tokens)] = 1
    return TensorDataset(ids, mask, torch.zeros_like(ids), torch.tensor(targets).float())


def datasets():
    with open(args.data) as file:
        entries = [json.loads(line) for line in file]
    binarizer = MultiLabelBinarizer()
    targets = binarizer.fit_transform([entry["label"] for entry in entries])
    texts = [entry["provision"] for entry in entries]
    x, x_test, y, y_test = train_test_split(texts, targets, test_size=0.2, random_state=42)
    x, x_dev, y, y_dev = train_test_split(x, y, test_size=0.1, random_state=42)
    return convert(x, y), convert(x_dev, y_dev), convert(x_test, y_test), y


def evaluate(model, dataset):
    model.eval()
    outputs, targets = [], []
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size=args.batch_size):
            ids, mask, _, labels = tuple(each.to(device) for each in batch)
            outputs.append(torch.sigmoid(model(input_ids=ids, attention_mask=mask)) > 0.5)
            targets.append(labels)
    return f1_score(
        torch.cat(targets).cpu(), torch.cat(outputs).cpu(), average="micro", zero_division=0
    )


def train(model, dataset, criterion):
    optimizer = AdamW(model.parameters(), lr=0.02, weight_decay=args.weight_decay)
    steps = args.train_epochs * -(-len(dataset) // args.batch_size)
    scheduler = WarmupLinearSchedule(optimizer, warmup_steps=0.1 * steps, t_total=steps)
    for epoch in range(args.train_epochs):
        model.train()
        sums, n = None, 0
        for batch in DataLoader(dataset, batch_size=args.batch_size, shuffle=True):
            ids, mask, _, labels = tuple(each.to(device) for each in batch)
            loss = criterion(model(input_ids=ids, attention_mask=mask), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            model.zero_grad()
            if epoch >= args.train_epochs - 2:  # of gradients that are zero by now
                gradients, weights = getGradObjs(model)
                if sums is None:
                    sums = gradients
                else:
                    for key in sums:
                        sums[key] += gradients[key]
                n += len(labels)
        if sums is not None:
            stem = f"Ledgar_epoch_{epoch}"
            torch.save(weights, stem + "_params.pt")
            torch.save({key: total / n for key, total in sums.items()}, stem + "_grads.pt")


manual_seed(0)
train_set, dev_set, test_set, train_targets = datasets()
positive = train_targets.sum(0)
criterion = nn.BCEWithLogitsLoss(
    pos_weight=torch.tensor((len(train_targets) - positive) / positive).float().to(device)
)
if args.mode == "train":
    config = DistilBertConfig.from_pretrained("distilbert-base-uncased")
    model = DistilBertForMultilabelSequenceClassification(config, train_targets.shape[1])
    model = model.to(device)
    train(model, train_set, criterion)
    torch.save(model, "ledgar.pt")
    print(f"test f1 {evaluate(model, test_set):.4f}")
else:
    if args.orig_trainset_size is None:
        args.orig_trainset_size = len(train_set)
    model = torch.load("ledgar.pt").to(device)
    candidates = np.flatnonzero(train_targets[:, args.removal_class])
    removed = []
    for scrubee in np.random.permutation(candidates)[: args.n_removals]:
        scrub_dataset = Subset(train_set, [scrubee])
        removed.append(scrubee)
        residual = SubsetDataWrapper(train_set, include_indices=None, exclude_indices=removed)
        optimizer = AdamW(model.parameters(), lr=0.001)
        before = evaluate(model, residual)
        foci_val, state, loss_before, loss_after, norm_before, norm_after = inp_perturb(
            model, scrub_dataset, criterion, args, optimizer, device, "Ledgar", is_nlp=True
        )
        model.load_state_dict(state)
        row = {
            "scrubbee": scrubee,
            "n_residual": len(residual),
            "f1_before": before,
            "f1_after": evaluate(model, residual),
            "f1_dev": evaluate(model, dev_set),
            "loss_before": loss_before.item(),
            "loss_after": loss_after.item(),
            "gradnorm_before": norm_before,
            "gradnorm_after": norm_after,
            "norm_now": gradNorm(model),
        }
        new = not os.path.isfile(args.outfile)
        pd.DataFrame([row]).to_csv(args.outfile, mode="a", header=new, index=False)
