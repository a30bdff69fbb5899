"""Elementwise functions: the error function, masks instead of comparisons, rounding."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, fx

from export.lowering.rewrites.rule import Declined, replace
from export.torch_internals import GraphShapes

aten = torch.ops.aten

_MAGIC = 1.5 * 2**23
"""Adding this number to a small float32 and subtracting it again rounds half to even."""


def erf(x: Tensor) -> Tensor:
    """The error function computed by GELU: ``gelu(a) / a = (1 + erf(a / √2)) / 2``.

    It is evaluated at ``|x|``, at least 1e-6, and gets the sign of ``x``. All graphs add 1 to the
    result, so the error near zero is within rounding.
    """
    size = (x.abs() * math.sqrt(2)).clamp(min=1e-6)
    positive: Tensor = aten.gelu.default(size) / size * 2 - 1
    return positive * (x * 1e30).clamp(-1.0, 1.0)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU by its approximation with tanh, which XNNPACK computes as the exact GELU instead."""
    if approximate == "none":
        raise Declined
    inner = x * (1 + 0.044715 * (x * x)) * math.sqrt(2 / math.pi)
    return x * (1 + torch.tanh(inner)) * 0.5


def use_masks(node: fx.Node, graph: fx.Graph, shapes: GraphShapes) -> None:
    """Replace the gradient of ReLU, ``where(x <= 0, 0, g)``, by ``g`` times a mask of 0 and 1."""
    if node.target is not aten.where.self:
        return
    condition, zero, gradient = (cast(fx.Node, n) for n in node.args)
    if condition.target is not aten.le.Scalar or condition.args[1] != 0:
        return
    if zero.target is not aten.scalar_tensor.default or zero.args[0] != 0:
        return

    def masked(x: Tensor, g: Tensor) -> Tensor:
        return g * x.ceil().clamp(0.0, 1.0)

    replace(node, masked, (condition.args[0], gradient), {}, graph, shapes)


def round_late(node: fx.Node, graph: fx.Graph, shapes: GraphShapes) -> None:
    """Replace ``clamp(round(x), -n, n)``, for a small integer n: clamp, then round by addition."""
    if node.target is not aten.clamp.default:
        return
    inner = cast(fx.Node, node.args[0])
    bounds = node.args[1:]
    if inner.target is not aten.round.default or len(bounds) != 2:
        return
    if not all(isinstance(b, int | float) and b == int(b) and abs(b) < 2**22 for b in bounds):
        return

    def rounded(x: Tensor) -> Tensor:
        return x.clamp(float(bounds[0]), float(bounds[1])) + _MAGIC - _MAGIC  # type: ignore[arg-type]

    replace(node, rounded, (inner.args[0],), {}, graph, shapes)
