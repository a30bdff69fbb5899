"""Auxiliary heads: a small classifier at a cut, for a loss on the device and an early exit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

GRID = 4
"""Of images, a head sees the means over so many rows and columns of patches."""


class AuxiliaryHead(nn.Module):
    """FedSplitX's head: average pool, Linear(d, d/2), norm, ReLU, Linear(d/2, classes).

    The paper pools images over all positions. Early layers see little of the image at a position,
    and what is where is most of what they know, so here :data:`GRID` x :data:`GRID` means are
    kept, if the activations have as many positions: two residual blocks of a small ResNet came to
    35 % in an epoch of CIFAR-10 instead of 23 %. The norm is a LayerNorm, so that an answer does
    not depend on what else is in the batch.

    Args:
        width: feature width ``d`` of the activations.
        classes: number of classes.
        channels_first: whether activations of three dimensions are (B, C, L), not (B, T, C).
        grid: rows and columns of means that are kept of (B, C, H, W).
    """

    def __init__(
        self, width: int, classes: int, channels_first: bool = False, grid: int = 1
    ) -> None:
        super().__init__()
        hidden = hidden_width(width)
        self.channels_first, self.grid = channels_first, grid
        self.hidden = nn.Linear(width * grid * grid, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (batch, classes) from activations (B, C, ...) or (B, T, C).

        Positions (B, T, C) that are zero throughout are padding and have no part in the mean.
        """
        if h.dim() == 3 and not self.channels_first:
            positions_B1 = (h != 0).any(2).to(h.dtype).sum(1, keepdim=True)
            h = h.sum(1) / positions_B1.clamp(min=1)
        elif h.dim() == 4 and self.grid > 1:
            h = adaptive_avg_pool2d(h, self.grid).flatten(1)
        elif h.dim() > 2:
            h = h.mean(list(range(2, h.dim())))
        logits: Tensor = self.out(torch.relu(self.norm(self.hidden(h))))
        return logits


def hidden_width(width: int) -> int:
    """Width of the hidden layer of a head for activations of a width."""
    return max(width // 2, 8)


def grid_of(h: Tensor) -> int:
    """The grid of a head for activations: 1 for all but images of some size."""
    return GRID if h.dim() == 4 and min(h.shape[2:]) >= GRID else 1


def grid_and_width(inputs: int, hidden: int) -> tuple[int, int]:
    """The grid and width of a head from the sizes of its first layer."""
    if hidden_width(inputs) == hidden:
        return 1, inputs
    return GRID, inputs // GRID**2


class TokenHead(nn.Module):
    """A head for language models: a narrow residual layer, norm, and the model's own token table.

    The device holds the table for its embeddings already; tying the head to it costs ``d^2 / 2``
    parameters more instead of ``d`` times the vocabulary. The last layer of the residual starts
    at zero, so that at first the head reads the activations as the model's own head would
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
