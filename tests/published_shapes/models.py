"""What scripts of images find as their own ``models``."""

import torch
from torch import nn


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
        self.linear2 = nn.Linear(12, 10)

    def forward(self, x):
        return self.linear2(torch.relu(self.linear1(x.view(-1, 64))))


class SmallVGG(nn.Module):
    """Convolutions and two linear layers of one shape, for images of 3 x 8 x 8."""

    def __init__(self, n_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc6 = nn.Linear(96, 24)
        self.fc7 = nn.Linear(24, 24)
        self.fc8 = nn.Linear(24, n_classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return self.fc8(torch.relu(self.fc7(torch.relu(self.fc6(x)))))
