"""ResNet-18 for 32x32 images: 8 residual blocks, by default at a quarter of the width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.cutting.split_model import SplitModel
from server_hub.demo.digits import PooledHead

GROUP = 4
"""Channels of a group, the same in every layer, so that narrower versions have the same groups."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(channels // GROUP, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(channels // GROUP, channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.skip = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                nn.GroupNorm(channels // GROUP, channels),
            )

    def forward(self, h: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(h)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.skip(h))


def build(width: int = 16, classes: int = 10, stride: int = 2) -> SplitModel:
    """Build a stem and 8 blocks, two in each of four stages; every stage doubles the channels.

    Args:
        width: channels of the first stage; ResNet-18 has 64.
        classes: number of classes.
        stride: stride of the stem; with 2 a step takes a quarter of the time.
    """
    torch.manual_seed(0)
    stem = nn.Sequential(
        nn.Conv2d(3, width, 3, stride, 1, bias=False),
        nn.GroupNorm(width // GROUP, width),
        nn.ReLU(),
    )
    blocks, channels_in = [], width
    for stage in range(4):
        channels = width * 2**stage
        for first in (True, False):
            blocks.append(BasicBlock(channels_in, channels, 2 if first and stage else 1))
            channels_in = channels
    return SplitModel(stem, blocks, PooledHead(channels_in, classes))
