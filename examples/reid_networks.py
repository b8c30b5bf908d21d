"""Networks of the re-identification example, at any width: ResNet-50, MobileNet-V2 and OSNet.

Each is made by a function of (width, depths), which returns it and the channels of its last map.
They reduce images less than published, as the example's have a quarter of the paper's height.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def resnet(width: float, depths: tuple[int, ...]) -> tuple[nn.Module, int]:
    """A ResNet with bottlenecks, from scratch, without the stem's pooling and last stride."""
    from transformers import ResNetConfig, ResNetModel

    sizes = [round(width * size) for size in (256, 512, 1024, 2048)]
    config = ResNetConfig(
        embedding_size=max(8, round(width * 64)),
        hidden_sizes=sizes,
        depths=list(depths),
        layer_type="bottleneck",
    )
    model = ResNetModel(config)
    model.embedder.pooler = nn.Identity()
    first = model.encoder.stages[-1].layers[0]
    for module in first.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    return model, sizes[-1]


def mobilenet(width: float, depths: tuple[int, ...]) -> tuple[nn.Module, int]:
    """MobileNet-V2 from scratch, at twice the width asked for; it has few channels."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    config = MobileNetV2Config(
        depth_multiplier=min(1.0, 2 * width), output_stride=16, finegrained_output=width >= 1
    )
    model = MobileNetV2Model(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # the config's is TensorFlow's: 0.997 of the last batch in torch
    return model, model.conv_1x1.convolution.out_channels


# ---------------------------------------------------------------------------------------------
# OSNet: Zhou et al., Omni-Scale Feature Learning for Person Re-Identification, ICCV 2019

STREAMS = 4  # of a block; the t-th sees 2t + 1 pixels each way
SQUEEZE = 16  # channels by neurons of a gate
STAGES = (256, 384, 512)  # channels
BLOCKS = 2  # in a stage


def _convolution(ins: int, outs: int, size: int = 1, stride: int = 1) -> list[nn.Module]:
    """A convolution with batch norm."""
    layer = nn.Conv2d(ins, outs, size, stride, size // 2, bias=False)
    return [layer, nn.BatchNorm2d(outs)]


class Lite(nn.Sequential):
    """A 3 x 3 convolution in two: across channels first, then each channel in space."""

    def __init__(self, size: int) -> None:
        super().__init__(
            nn.Conv2d(size, size, 1, bias=False),
            nn.Conv2d(size, size, 3, padding=1, groups=size, bias=False),
            nn.BatchNorm2d(size),
            nn.ReLU(),
        )


class Gate(nn.Module):
    """How much of each channel passes, by the channels' means: one gate for all streams."""

    def __init__(self, size: int) -> None:
        super().__init__()
        few = max(1, size // SQUEEZE)
        self.layers = nn.Sequential(
            nn.Linear(size, few), nn.ReLU(), nn.Linear(few, size), nn.Sigmoid()
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.layers(maps.mean((2, 3)))[:, :, None, None]


class OmniScale(nn.Module):
    """A residual bottleneck of streams with one to four convolutions, which a gate mixes."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        size = outs // 4
        self.first = nn.Sequential(*_convolution(ins, size), nn.ReLU())
        self.streams = nn.ModuleList(
            nn.Sequential(*(Lite(size) for _ in range(t))) for t in range(1, STREAMS + 1)
        )
        self.gate = Gate(size)
        self.last = nn.Sequential(*_convolution(size, outs))
        self.shortcut = nn.Sequential(*(_convolution(ins, outs) if ins != outs else []))

    def forward(self, maps: Tensor) -> Tensor:
        first = self.first(maps)
        mixed = torch.stack([self.gate(stream(first)) for stream in self.streams]).sum(0)
        return (self.last(mixed) + self.shortcut(maps)).relu()


def osnet(width: float, depths: tuple[int, ...]) -> tuple[nn.Module, int]:
    """OSNet from scratch, at twice the width asked for; it has few channels.

    Its stem pools, as depthwise convolutions are slow on CPUs, and the last stage keeps its
    resolution instead.
    """
    share = min(1.0, 2 * width)
    stem, *sizes = (round(share * size) for size in (64, *STAGES))
    layers: list[nn.Module] = [*_convolution(3, stem, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    ins = stem
    for k, outs in enumerate(sizes):
        layers += [OmniScale(ins if b == 0 else outs, outs) for b in range(BLOCKS)]
        if k < len(sizes) - 1:  # between stages
            layers += [*_convolution(outs, outs), nn.ReLU()]
            layers += [nn.AvgPool2d(2)] if k == 0 or width >= 1 else []
        ins = outs
    layers += [*_convolution(ins, ins), nn.ReLU()]
    return nn.Sequential(*layers), ins


NETWORKS: dict[str, Callable] = {"resnet": resnet, "mobilenet": mobilenet, "osnet": osnet}
TITLES = {"resnet": "ResNet", "mobilenet": "MobileNet-V2", "osnet": "OSNet"}
