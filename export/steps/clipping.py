"""Clipping of gradients by their global norm, as ``torch.nn.utils.clip_grad_norm_`` does it."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.steps.step import Tensors

MAX_NORM = Port(TensorSpec("max_norm", "float32", ()), "hyper")
"""Largest norm of the gradients of a step; 0 for no bound."""

_TINY = 1e-6
"""Added to the norm, as torch.nn.utils does."""


def clipped(gradients: Tensors, max_norm: Tensor) -> Tensors:
    """Gradients scaled down to a global norm of at most ``max_norm``.

    Every gradient is multiplied by ``min(1, max_norm / (norm + 1e-6))``, and by exactly 1 where
    ``max_norm`` is 0. A norm that is not a number makes all of them not a number.

    Args:
        gradients: gradients by name.
        max_norm: the bound, a scalar; 0 for none.
    """
    if not gradients:
        return gradients
    squares = torch.stack([_sum(g.square()) for g in gradients.values()])
    scale = max_norm / (squares.sum().sqrt() + _TINY)
    # written so that a comparison with NaN, which is false, does not hide it
    scale = torch.where((max_norm <= 0) | (scale > 1), torch.ones_like(scale), scale)
    return {name: g * scale for name, g in gradients.items()}


def _sum(x: Tensor) -> Tensor:
    """Sum of all elements, by rows first.

    ONNX Runtime adds the elements one after the other: of 38 million squares it loses 0.5 % in
    float32, and with sums of rows 2e-7.
    """
    return x.flatten(1).sum(1).sum() if x.dim() > 1 else x.sum()
