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
    """Replace conditions on one tensor that are converted to numbers, ``(x > 0).to(float)``."""
    if node.target is not aten._to_copy.default or node.meta["val"].dtype != torch.float32:
        return
    conditions = _conditions(cast(fx.Node, node.args[0]))
    if not conditions:
        return

    def mask(*tensors: Tensor) -> Tensor:
        product = None
        for x, condition in zip(tensors, conditions, strict=True):
            # the sign of a difference is exact
            bound = cast(float, condition.args[1])
            above = x if condition.target is aten.gt.Scalar else x * -1.0
            if bound != 0:
                above = above - bound if condition.target is aten.gt.Scalar else above + bound
            one = above.ceil().clamp(0.0, 1.0)
            product = one if product is None else product * one
        assert product is not None
        return product

    replace(node, mask, tuple(c.args[0] for c in conditions), {}, graph, shapes)


def _conditions(node: fx.Node) -> list[fx.Node]:
    """The comparisons of float32 tensors with numbers whose conjunction a node is, if it is one."""
    if node.target is aten.logical_and.default:
        parts = [_conditions(cast(fx.Node, part)) for part in node.args]
        return [c for part in parts for c in part] if all(parts) else []
    if node.target not in (aten.gt.Scalar, aten.lt.Scalar):
        return []
    return [node] if cast(fx.Node, node.args[0]).meta["val"].dtype == torch.float32 else []


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
