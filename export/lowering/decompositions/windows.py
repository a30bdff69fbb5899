"""Sliding windows along one dimension, and their adjoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def pad(x: Tensor, dim: int, before: int, after: int, value: float = 0.0) -> Tensor:
    """``x`` with so many entries of ``value`` before and after it along ``dim``."""
    if before == after == 0:
        return x
    widths = [0, 0] * (x.dim() - 1 - dim % x.dim()) + [before, after]
    padded: Tensor = aten.constant_pad_nd.default(x, widths, value)
    return padded


def crop(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``length`` entries of ``x`` from ``start`` along ``dim``."""
    if start == 0 and length == x.shape[dim]:
        return x
    part: Tensor = aten.slice.Tensor(x, dim, start, start + length)
    return part


def windows(
    x: Tensor, dim: int, kernel: int, stride: int, dilation: int, outputs: int
) -> list[Tensor]:
    """What every kernel position sees: entry k holds ``x[o * stride + k * dilation]`` for all o.

    There is no padding: what the last window needs must be there.
    """
    reach = (outputs - 1) * stride + 1
    starts = (k * dilation for k in range(kernel))
    return [aten.slice.Tensor(x, dim, start, start + reach, stride) for start in starts]


def fold(parts: Sequence[Tensor], dim: int, stride: int, dilation: int, size: int) -> Tensor:
    """The adjoint of :func:`windows`: adds ``part_k[o]`` at ``o * stride + k * dilation``.

    Positions with the same remainder modulo the stride are added up at the size of the output;
    interleaving the remainders at the end gives ``size`` entries.
    """
    length = -(-size // stride)
    sums: list[Tensor | None] = [None] * stride
    for k, part in enumerate(parts):
        shift, remainder = divmod(k * dilation, stride)
        placed = pad(part, dim, shift, length - shift - part.shape[dim])
        before = sums[remainder]
        sums[remainder] = placed if before is None else before + placed
    assert sums[0] is not None
    if stride == 1:
        return sums[0]
    zeros = None if all(s is not None for s in sums) else torch.zeros_like(sums[0])
    interleaved = torch.stack([zeros if s is None else s for s in sums], dim + 1)  # type: ignore[misc]
    return crop(interleaved.flatten(dim, dim + 1), dim, 0, size)
