"""Small convolutional networks with GroupNorm in four widths, for CIFAR-10 and for 8x8 digits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from export.cutting.split_model import SplitModel

GROUP = 4
"""Channels of a group, the same at every width, so that narrower versions have the same groups."""


class ConvBlock(nn.Module):
    """A 3x3 convolution, GroupNorm and ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(channels // GROUP, channels)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(h)))


class GridHead(nn.Module):
    """A linear layer over all 4 x 4 positions.

    With their mean instead, the head of a base with an eighth of the channels would have only
    eight inputs.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(16 * channels, classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.out(h.flatten(1))
        return logits


def build(inputs: int, stages: tuple[tuple[int, int], ...], width: float) -> SplitModel:
    """Build a stem and blocks of one convolution each, and a head.

    Args:
        inputs: number of channels of the images.
        stages: channels at full width and stride of each convolution; the stem is the first.
        width: fraction of the channels to build.
    """
    torch.manual_seed(0)
    layers, before = [], inputs
    for channels, stride in stages:
        after = round(width * channels)
        layers.append(ConvBlock(before, after, stride))
        before = after
    return SplitModel(layers[0], layers[1:], GridHead(before, 10))


CIFAR = ((64, 2), (128, 2), (128, 2))
DIGITS = ((32, 1), (64, 2), (64, 1))

cifar_1, cifar_1_2, cifar_1_4, cifar_1_8 = (partial(build, 3, CIFAR, 2.0**-n) for n in range(4))
digits_1, digits_1_2, digits_1_4, digits_1_8 = (
    partial(build, 1, DIGITS, 2.0**-n) for n in range(4)
)
