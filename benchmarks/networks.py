"""Networks of the sizes that people use, with random weights, and batches for them.

The layers have the names that torchvision and transformers give them.
"""

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.downsample(x)).relu()


class InvertedResidual(nn.Module):
    """MobileNet V2's block: widen by 1 x 1, filter each channel, narrow by 1 x 1."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = inputs * widen
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class ResNet(nn.Module):
    """The form for images of 32 x 32: a stem of 3 x 3, four stages of two blocks."""

    def __init__(self, widths: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, width in enumerate(widths, 1):
            blocks = BasicBlock(inputs, width, 1 if stage == 1 else 2), BasicBlock(width, width, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = width
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def make(name: str, n: int, tiny: bool, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation mode, n inputs and their labels; `tiny`: with very few parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"ResNet-18": _resnet, "DistilBERT": _distilbert}[name](n, tiny)


def _resnet(n: int, tiny: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """11.2 million parameters, ten classes. Batch norm has the statistics of some of the images."""
    widths, pixels = ((4, 4, 6, 8), 16) if tiny else ((64, 128, 256, 512), 32)
    model = ResNet(widths, classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics are plain means
    X, y = torch.randn(n, 3, pixels, pixels), torch.randint(10, (n,))
    with torch.no_grad():
        model.train()(X[:32])
    return model.eval(), X, y


def _distilbert(n: int, tiny: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """67 million parameters, sequences of 64 tokens, 20 classes."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    class Classifier(DistilBertForSequenceClassification):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids).logits

    small = {"vocab_size": 50, "dim": 8, "hidden_dim": 12, "n_heads": 2, "initializer_range": 0.5}
    config = DistilBertConfig(num_labels=20, **small if tiny else {})
    X = torch.randint(config.vocab_size, (n, 5 if tiny else 64))
    return Classifier(config).eval(), X, torch.randint(config.num_labels, (n,))
