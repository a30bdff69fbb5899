"""The wide model of the demo with mixtures: for digits, to be split into eight by width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.cutting.split_model import SplitModel
from server_hub.demo.digits import PooledHead
from server_hub.simulation.digits import CLASSES

MODEL = "server_hub.demo.mix_model:build"
BASES = 8
GROUP = 4
"""Channels of a group of a norm, the same in a base as in the wide model."""


class ConvBlock(nn.Module):
    """A 3x3 convolution with GroupNorm."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(channels // GROUP, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Activations (batch, channels, height, width)."""
        return torch.relu(self.norm(self.conv(h)))


def build() -> SplitModel:
    """Four convolutions, 64 to 192 channels wide; inputs (batch, 1, 8, 8)."""
    torch.manual_seed(0)
    blocks = [ConvBlock(64, 128, 2), ConvBlock(128, 192, 2), ConvBlock(192, 192)]
    return SplitModel(ConvBlock(1, 64), blocks, PooledHead(192, CLASSES))
