"""Auxiliary heads: a small classifier at a cut, for a loss on the device and an early exit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AuxiliaryHead(nn.Module):
    """FedSplitX's head: global average pool, Linear(d, d/2), norm, ReLU, Linear(d/2, classes).

    The norm is a LayerNorm, so that an answer does not depend on what else is in the batch.

    Args:
        width: feature width ``d`` of the activations.
        classes: number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        hidden = max(width // 2, 8)
        self.hidden = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (batch, classes) from activations (B, C, H, W), (B, T, C) or (B, C)."""
        if h.dim() == 4:
            h = h.mean((2, 3))
        elif h.dim() == 3:
            h = h.mean(1)
        logits: Tensor = self.out(torch.relu(self.norm(self.hidden(h))))
        return logits
