"""Models that can be narrowed, of every kind of layer, with random weights in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from export.cutting.split_model import SplitModel
from server_hub.demo import digits
from tests.lib.models import (
    MeanHead,
)

CLASSES = 10
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def batch_norm(channels: int) -> nn.Module:
    """Return a batch norm."""
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    """Return a group norm with groups of two channels."""
    return nn.GroupNorm(channels // 2, channels)


class Basic(nn.Module):
    """The basic block of a ResNet for CIFAR, with a convolution in the skip connection."""

    def __init__(self, before: int, after: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = norm(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = norm(after)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride), norm(after))

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(h)))))
        result: Tensor = self.relu(inner + self.downsample(h))
        return result


class Rows(nn.Module):
    """An MLP with a norm over channels at every position; channels are the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        result: Tensor = h + torch.tanh(self.linear(self.norm(h)))
        return result


def resnet(norm: Any, channels: int = 8, seed: int = 0) -> SplitModel:
    """Return a ResNet whose input is normalised by a batch norm that keeps its 3 channels."""
    torch.manual_seed(seed)
    stem = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Conv2d(3, channels, 3, 1, 1, bias=False),
        norm(channels),
        nn.ReLU(),
    )
    blocks = [
        Basic(channels, channels, 1, norm),
        Basic(channels, 2 * channels, 2, norm),
        Basic(2 * channels, 2 * channels, 1, norm),
    ]
    return SplitModel(stem, blocks, MeanHead(2 * channels, CLASSES))


def plain(head: nn.Module | None = None, *middle: nn.Module, seed: int = 0) -> SplitModel:
    """Return convolutions without norms for (B, 1, 4, 4); by default the head flattens."""
    torch.manual_seed(seed)
    head = head or nn.Sequential(
        nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    )
    blocks = [nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(*middle) if middle else nn.ReLU()]
    return SplitModel(nn.Conv2d(1, 8, 3, padding=1), blocks, head)


def depthwise(seed: int = 0) -> SplitModel:
    """Return depthwise and grouped convolutions, as in MobileNet."""
    middle = [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(16, 8, 3, padding=1, groups=4),
        nn.InstanceNorm2d(8, affine=True),
    ]
    return plain(None, *middle, seed=seed)


def signals(seed: int = 0) -> SplitModel:
    """Return grouped Conv1d layers, and a head of convolution and norm that scales its answer."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Conv1d(8, CLASSES, 1)
            self.norm = nn.GroupNorm(5, CLASSES)

        def forward(self, h: Tensor) -> Tensor:
            scaled: Tensor = 2 * self.norm(self.out(h)).mean(2)
            return scaled

    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Conv1d(8, 8, 3), nn.GroupNorm(4, 8), nn.GELU()) for _ in range(2)]
    return SplitModel(nn.Conv1d(1, 8, 3), blocks, Head(), channels="first")


def rows(seed: int = 0) -> SplitModel:
    """Return linear layers and LayerNorms, with channels last."""
    torch.manual_seed(seed)
    return SplitModel(nn.Linear(3, 8), [Rows(8), Rows(8)], MeanHead(8, CLASSES))


MODELS = {
    "resnet-gn": (lambda seed: resnet(group_norm, seed=seed), (3, 8, 8), WIDTHS),
    "resnet-bn": (lambda seed: resnet(batch_norm, seed=seed), (3, 8, 8), WIDTHS),
    "digits": (lambda seed: digits.build(), (1, 8, 8), WIDTHS),
    "plain": (lambda seed: plain(seed=seed), (1, 4, 4), WIDTHS),
    "depthwise": (lambda seed: depthwise(seed), (1, 4, 4), WIDTHS),
    "signals": (lambda seed: signals(seed), (1, 12), (0.25, 0.5, 1.0)),
    "rows": (lambda seed: rows(seed), (5, 3), WIDTHS),
}


def make(name: str, seed: int = 0, rows: int = 3) -> tuple[SplitModel, Tensor]:
    """Return a model in float64 with auxiliary heads and random parameters, and some inputs."""
    build, shape, _ = MODELS[name]
    model = build(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, *shape), generator=generator)
    model.add_heads(range(1, model.depth), x, CLASSES)
    with torch.no_grad():
        for p in model.parameters():  # the initial ones and zeros of norms hide mistakes
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.double(), x.double()


def loss_of(model: SplitModel, x: Tensor) -> Tensor:
    """Return the cross-entropy of all heads, each with its own weight."""
    y = torch.arange(len(x)) % CLASSES
    loss = cross_entropy(model(x), y)
    for depth in model.head_depths:
        loss = loss + 0.1 * depth * cross_entropy(model.answer(depth, model.segment(x, depth)), y)
    return loss


def leading(full: Tensor, part: Tensor) -> Tensor:
    """Return the leading slice of ``full`` with the shape of ``part``."""
    return full[tuple(slice(n) for n in part.shape)]
