"""Slices and padding by operators that XNNPACK has: slices with a step of 1, finite padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from export.lowering.rewrites.rule import Declined

aten = torch.ops.aten

_LARGEST = torch.finfo(torch.float32).max


def slice_(
    x: Tensor, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """A slice with a step above 1 along an axis of known length."""
    length = x.shape[axis]
    if step == 1 or not isinstance(length, int) or not x.is_floating_point():
        raise Declined
    first, last, _ = slice(start, end).indices(length)
    size = len(range(first, last, step))
    if size == 0:
        raise Declined
    if axis % x.dim() == x.dim() - 1:  # XNNPACK multiplies faster than it copies single elements
        return linear(x, _selection(length, first, size, step, x))
    # elements behind the last row of the fold would be padded needlessly
    stop = min(length, (first // step + size) * step)
    return window(part(x, axis, 0, stop), axis % x.dim(), first, size, step)


def _selection(length: int, first: int, size: int, step: int, x: Tensor) -> Tensor:
    """A matrix (size, length) with a 1 in each row, ``step`` further right than in the last one."""
    ones = torch.full((size, 1), 1.0, dtype=x.dtype, device=x.device)
    # a row that is longer by a step moves what follows to the right, once it is cut as shorter ones
    longer = resize(ones, 1, first, length + step - 1 - first)
    return part(longer.reshape(-1), 0, 0, size * length).reshape(size, length)


def constant_pad_nd(x: Tensor, pad: list[int], value: float = 0.0) -> Tensor:
    """Padding with negative widths or with an infinity, which XNNPACK does not support."""
    if all(n >= 0 for n in pad) and math.isfinite(value):
        raise Declined
    value = min(max(value, -_LARGEST), _LARGEST)
    if all(n >= 0 for n in pad):
        return cast(Tensor, aten.constant_pad_nd.default(x, pad, value))
    for place in range(0, len(pad), 2):
        x = resize(x, x.dim() - 1 - place // 2, pad[place], pad[place + 1], value)
    return x


def window(x: Tensor, axis: int, start: int, size: int, step: int) -> Tensor:
    """``size`` elements of an axis from ``start`` on, ``step`` apart, by slices with step 1.

    The axis is folded into rows of ``step`` elements, and one column is selected.
    """
    if step == 1:
        return part(x, axis, start, size)
    first, column = divmod(start, step)
    missing = (first + size) * step - x.shape[axis]
    x = resize(x, axis, 0, missing)
    folded = x.reshape(*x.shape[:axis], first + size, step, *x.shape[axis + 1 :])
    picked = part(folded, axis + 1, column, 1).squeeze((axis + 1,))
    return part(picked, axis, first, size) if first else picked


def spread(x: Tensor, axis: int, step: int) -> Tensor:
    """Insert ``step - 1`` zeros behind every element of an axis."""
    if step == 1:
        return x
    apart = resize(x.unsqueeze(axis + 1), axis + 1, 0, step - 1)
    return apart.reshape(*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :])


def resize(x: Tensor, axis: int, before: int, after: int, value: float = 0.0) -> Tensor:
    """Pad both ends of an axis with a value; negative numbers crop."""
    if before < 0 or after < 0:
        start = max(-before, 0)
        x = part(x, axis, start, x.shape[axis] - start - max(-after, 0))
    if before > 0 or after > 0:
        pad = [0, 0] * (x.dim() - 1 - axis) + [max(before, 0), max(after, 0)]
        x = aten.constant_pad_nd.default(x, pad, value)
    return x


def part(x: Tensor, axis: int, start: int, size: int) -> Tensor:
    """``size`` elements of an axis from ``start`` on; all of them must exist."""
    return x if size == x.shape[axis] else aten.slice.Tensor(x, axis, start, start + size)


def cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """The tensors along an axis, or the only one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)
