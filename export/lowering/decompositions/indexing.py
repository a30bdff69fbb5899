"""Gradients of slices and embeddings; squeeze and power."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from export.lowering.decompositions.windows import fold, pad

aten = torch.ops.aten


def slice_backward(
    grad_out: Tensor, input_sizes: list[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """Gradient of ``x[start:end:step]`` along ``dim``: zeros around and between its entries."""
    if start == 0 and end == sys.maxsize and step == 1:
        same: Tensor = aten.alias.default(grad_out)  # the slice is all of x; its size is symbolic
        return same
    dim %= len(input_sizes)
    size = input_sizes[dim]
    if start < 0:
        start += size
    spread = fold([grad_out], dim, step, 1, (grad_out.shape[dim] - 1) * step + 1)
    return pad(spread, dim, start, size - start - spread.shape[dim])


def select_backward(grad_out: Tensor, input_sizes: list[int], dim: int, index: int) -> Tensor:
    """Gradient of ``x.select(dim, index)``: zeros around the gradient of one entry."""
    dim %= len(input_sizes)
    size = input_sizes[dim]
    if index < 0:
        index += size
    return pad(grad_out.unsqueeze(dim), dim, index, size - 1 - index)


def squeeze_dims(x: Tensor, dims: list[int]) -> Tensor:
    """Squeeze several dimensions one by one, the last first."""
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.squeeze(dim)
    return x


def unfold_backward(
    grad_out: Tensor, input_sizes: list[int], dim: int, size: int, step: int
) -> Tensor:
    """Gradient of ``x.unfold(dim, size, step)``: the sum of overlapping windows."""
    dim %= len(input_sizes)
    return fold(grad_out.unbind(-1), dim, step, 1, input_sizes[dim])


def embedding_dense_backward(
    grad_out: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_by_freq: bool
) -> Tensor:
    """Gradient of an embedding table: the sum of the gradients for each looked-up row."""
    if scale_by_freq:
        raise NotImplementedError("embedding gradients scaled by frequency")
    width = grad_out.shape[-1]
    rows = indices.reshape(-1)
    grad = grad_out.reshape(-1, width)
    if padding_idx >= 0:
        grad = grad * (rows != padding_idx).to(grad.dtype).unsqueeze(1)
    zeros = grad.new_zeros(num_weights, width)
    table: Tensor = aten.index_put.default(zeros, [rows], grad, True)
    return table


def pow_scalar(x: Tensor, exponent: float) -> Any:
    """``x ** 1`` and ``x ** 2`` without the power operator, as gradients of squares need them.

    Returns ``NotImplemented`` for other exponents, which keeps the operator.
    """
    if exponent == 1:
        same: Tensor = aten.alias.default(x)
        return same
    if exponent == 2:
        return x * x
    return NotImplemented
