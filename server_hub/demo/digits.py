"""The demo's model and data: scikit-learn's bundled handwritten digits, 1,797 images of 8 x 8."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.training.data import Examples
from export.cutting.heads import AuxiliaryHead
from export.cutting.split_model import SplitModel
from server_hub.simulation.digits import CLASSES
from server_hub.simulation.partition import dirichlet

MODEL = "server_hub.demo.digits:build_for_demo"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a skip connection."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.skip = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(h)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.skip(h))


class PooledHead(nn.Module):
    """Global average pool and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(channels, classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.out(h.mean((2, 3)))
        return logits


def build() -> SplitModel:
    """A residual network for digits: a stem, 6 blocks, a head; inputs (batch, 1, 8, 8)."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.GroupNorm(4, 8), nn.ReLU())
    blocks = [
        ResidualBlock(8, 8, 2),
        ResidualBlock(8, 16),
        ResidualBlock(16, 24),
        ResidualBlock(24, 48, 2),
        ResidualBlock(48, 48),
        ResidualBlock(48, 48),
    ]
    return SplitModel(stem, blocks, PooledHead(48, CLASSES))


def build_for_demo() -> SplitModel:
    """:func:`build` with the paper's heads, which pool over all positions, at depths 1, 3 and 5.

    The heads that export adds keep a grid of positions. With them the poorest device alone reads
    digits as well as the whole model, and a hub would make no difference.
    """
    model = build()
    for depth, width in ((1, 8), (3, 24), (5, 48)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(depth)
            model.aux[str(depth)] = AuxiliaryHead(width, CLASSES, "first")
    return model


def partition(data: Examples, devices: int, alpha: float, seed: int = 0) -> list[Examples]:
    """Share examples out so that every device has its own mix of classes.

    For each class the shares of the devices are drawn from a Dirichlet distribution; small
    ``alpha`` is skewed, large is even. Every example goes to exactly one device.
    """
    owner = dirichlet(data.y, CLASSES, devices, alpha, np.random.default_rng(seed))
    return [Examples(data.x[owner == d], data.y[owner == d]) for d in range(devices)]
