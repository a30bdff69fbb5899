"""Auxiliary heads: small classifiers at a cut, which give a device a loss and an early exit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from export.cutting.channels import Channels

GRID = 4
"""Rows and columns of means to which a head pools images."""


class AuxiliaryHead(nn.Module):
    """The head of FedSplitX: average pool, Linear(d, d/2), norm, ReLU, Linear(d/2, classes).

    The paper pools images over all positions. Early layers have a small receptive field, so most
    of their information is in the positions. This head pools to ``grid`` x ``grid`` means: with
    :data:`GRID`, two residual blocks of a small ResNet reached 35 % in an epoch of CIFAR-10
    instead of 23 %. The norm is a LayerNorm, so that an answer does not depend on the rest of the
    batch.

    Args:
        width: feature width ``d`` of the activations.
        classes: number of classes.
        channels: where activations have their channels: (B, C, ...) or (B, ..., C).
        grid: rows and columns of means to which images are pooled.
    """

    def __init__(self, width: int, classes: int, channels: Channels, grid: int = 1) -> None:
        super().__init__()
        hidden = hidden_width(width)
        self.channels, self.grid = channels, grid
        self.hidden = nn.Linear(width * grid * grid, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (batch, classes) from activations (B, C, ...) or (B, ..., C).

        Positions of (B, T, C) whose channels are all zero are padding and do not count in the mean.
        """
        last = self.channels == "last"
        if h.dim() == 3 and last:
            positions_B1 = (h != 0).any(2).to(h.dtype).sum(1, keepdim=True)
            h = h.sum(1) / positions_B1.clamp(min=1)
        elif h.dim() == 4 and self.grid > 1:
            h_BCHW = h.permute(0, 3, 1, 2) if last else h
            h = adaptive_avg_pool2d(h_BCHW, self.grid).flatten(1)
        elif h.dim() > 2:
            h = h.mean((1, 2) if last else list(range(2, h.dim())))
        logits: Tensor = self.out(torch.relu(self.norm(self.hidden(h))))
        return logits


def hidden_width(width: int) -> int:
    """Width of the hidden layer of a head for activations of width ``width``."""
    return max(width // 2, 8)


def grid_of(h: Tensor, channels: Channels) -> int:
    """The grid of a head: :data:`GRID` for images with as many rows and columns, else 1."""
    positions = h.shape[2:] if channels == "first" else h.shape[1:-1]
    return GRID if len(positions) == 2 and min(positions) >= GRID else 1


def grid_and_width(inputs: int, hidden: int) -> tuple[int, int]:
    """The grid and feature width of a head, from the input and output size of its first layer."""
    if hidden_width(inputs) == hidden:
        return 1, inputs
    return GRID, inputs // GRID**2


class TokenHead(nn.Module):
    """A head for language models: a narrow residual layer, a norm, and the stem's token table.

    The device holds the table already, for its embeddings. Tying the head to it takes ``d^2 / 2``
    further parameters instead of ``d`` times the vocabulary. The last layer of the residual starts
    at zero, so that the head first decodes the activations like the model's own head
    ("logit lens").

    Args:
        width: feature width ``d`` of the activations.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(width // 4, 8)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h_BTD: Tensor, table_VD: Tensor) -> Tensor:
        """Logits (batch, positions, vocabulary) from activations and the token table."""
        h_BTD = self.norm(h_BTD + self.up(torch.relu(self.down(h_BTD))))
        return h_BTD @ table_VD.t()
