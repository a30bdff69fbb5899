"""Sliding windows along one dimension, and their adjoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.torch_internals import always_true

aten = torch.ops.aten


def pad(x: Tensor, dim: int, before: int, after: int, value: float = 0.0) -> Tensor:
    """Pad ``x`` along ``dim`` with ``before`` and ``after`` entries of ``value``."""
    if always_true(before == 0) and always_true(after == 0):
        return x
    widths = [0, 0] * (x.dim() - 1 - dim % x.dim()) + [before, after]
    padded: Tensor = aten.constant_pad_nd.default(x, widths, value)
    return padded


def crop(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``length`` entries of ``x`` from ``start`` along ``dim``."""
    if start == 0 and always_true(length == x.shape[dim]):
        return x
    part: Tensor = aten.slice.Tensor(x, dim, start, start + length)
    return part


def shifted(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``length`` entries of ``x`` from ``start`` on along ``dim``, with zeros outside of ``x``.

    Some of them must be in ``x``, whose size is known.
    """
    before, after = -start, start + length - x.shape[dim]
    if before <= 0 and after <= 0:  # faster than padding by negative widths
        return crop(x, dim, start, length)
    widths = [0, 0] * (x.dim() - 1 - dim) + [before, after]
    moved: Tensor = aten.constant_pad_nd.default(x, widths)
    return moved


def windows(
    x: Tensor, dim: int, kernel: int, stride: int, dilation: int, outputs: int
) -> list[Tensor]:
    """The inputs of every kernel position: entry k is ``x[o * stride + k * dilation]`` for all o.

    ``x`` must contain all of the last window, since nothing is padded.
    """
    reach = (outputs - 1) * stride + 1
    starts = (k * dilation for k in range(kernel))
    return [aten.slice.Tensor(x, dim, start, start + reach, stride) for start in starts]


def fold(parts: Sequence[Tensor], dim: int, stride: int, dilation: int, size: int) -> Tensor:
    """The adjoint of :func:`windows`: adds ``part_k[o]`` at ``o * stride + k * dilation``.

    Parts whose positions have the same remainder modulo the stride are added first. Interleaving
    the remainders then gives ``size`` entries.
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
    apart = [(zeros if s is None else s).unsqueeze(dim + 1) for s in sums]  # type: ignore[union-attr]
    interleaved = torch.cat(apart, dim + 1)
    shape = sums[0].shape
    merged = interleaved.reshape(*shape[:dim], length * stride, *shape[dim + 1 :])
    return crop(merged, dim, 0, size)
