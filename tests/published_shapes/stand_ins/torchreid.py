"""As much of a patched torchreid as scripts call: a tiny network, and files of gradients."""

import os
import types

import numpy as np
import torch
from grad_utils import getGradObjs
from torch import nn
from torch.utils.data import DataLoader, Dataset


class _People(Dataset):
    def __init__(self, images, pids):
        self._images, self._pids = images, pids

    def __len__(self):
        return len(self._pids)

    def __getitem__(self, k):
        image = torch.tensor(self._images[k])
        return {"img": image, "pid": int(self._pids[k]), "camid": 0, "impath": f"{k}.jpg"}


class _ImageDataManager:
    def __init__(self, root, sources, height, width, batch_size_train):
        with np.load(os.path.join(root, f"{sources}.npz")) as file:
            images, pids = file["images"], file["pids"]
        assert images.shape[2:] == (height, width)
        train, query = (_People(images[k::3], pids[k::3]) for k in (0, 1))
        self.train_loader = DataLoader(train, batch_size_train, shuffle=True)
        self.query, self.gallery = DataLoader(query, 64), DataLoader(train, 64)
        self.num_train_pids = len(set(pids))


class _Tiny(nn.Module):
    """Logits in training mode, features otherwise."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(96, 16)
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn(self.conv(x))), 2).flatten(1)
        features = torch.relu(self.fc(x))
        return self.classifier(features) if self.training else features


class _ImageSoftmaxEngine:
    def __init__(self, datamanager, model, optimizer, scheduler=None, label_smooth=True):
        self.datamanager, self.model = datamanager, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1 if label_smooth else 0.0)

    def compute_loss(self, criterion, outputs, targets):
        return criterion(outputs, targets)

    def run(self, save_dir, max_epoch=0, test_only=False, **_):
        if not test_only:
            os.makedirs(os.path.join(save_dir, "model"), exist_ok=True)
            for epoch in range(max_epoch):
                self._epoch(save_dir, epoch, max_epoch)
            name = os.path.join(save_dir, "model", f"model.pth.tar-{max_epoch}")
            torch.save({"state_dict": self.model.state_dict()}, name)
        rank1 = self._rank1()
        print(f"Rank-1 {rank1:.3f}")
        return rank1

    def _epoch(self, save_dir, epoch, max_epoch):
        self.model.train()
        sums, n = None, 0
        for batch in self.datamanager.train_loader:
            self.optimizer.zero_grad()
            loss = self.compute_loss(self.criterion, self.model(batch["img"]), batch["pid"])
            loss.backward()
            self.optimizer.step()
            gradients, weights = getGradObjs(self.model)
            if sums is None:
                sums = gradients
            else:
                for key in sums:
                    sums[key] += gradients[key]
            n += len(batch["pid"])
        if epoch >= max_epoch - 2:
            stem = os.path.join(save_dir, f"market1501_epoch_{epoch}")
            torch.save(weights, stem + "_params.pt")
            torch.save({key: total / n for key, total in sums.items()}, stem + "_grads.pt")

    def _rank1(self):
        """The share of queries whose nearest image is of the same person."""
        self.model.eval()
        with torch.no_grad():
            (q, q_pids), (g, g_pids) = (
                [torch.cat(parts) for parts in zip(*found, strict=True)]
                for loader in (self.datamanager.query, self.datamanager.gallery)
                for found in [[(self.model(b["img"]), b["pid"]) for b in loader]]
            )
            nearest = torch.cdist(q, g).argmin(1)
        return float((g_pids[nearest] == q_pids).float().mean())


def _load_pretrained_weights(model, name):
    model.load_state_dict(torch.load(name)["state_dict"])


data = types.SimpleNamespace(ImageDataManager=_ImageDataManager)
models = types.SimpleNamespace(
    build_model=lambda name, num_classes, loss, pretrained: _Tiny(num_classes)
)
optim = types.SimpleNamespace(
    build_optimizer=lambda model, optim, lr: torch.optim.Adam(model.parameters(), lr=lr),
    build_lr_scheduler=lambda optimizer, lr_scheduler, stepsize: None,
)
engine = types.SimpleNamespace(ImageSoftmaxEngine=_ImageSoftmaxEngine)
utils = types.SimpleNamespace(load_pretrained_weights=_load_pretrained_weights)
