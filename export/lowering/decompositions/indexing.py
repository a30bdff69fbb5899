"""Gradients of slices and embeddings, sums at indices; squeeze and power.

Sums at indices are ``scatter_add``, which becomes ScatterElements. ONNX Runtime runs that on one
thread. Its ScatterND adds on several threads without atomics, so sums into one row would be lost.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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
    return _added_rows(grad.new_zeros(num_weights, width), rows, grad)


def index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    """``x[indices] += values``, where equal indices add up.

    Returns ``NotImplemented`` without ``accumulate`` and for masks, which keeps the operator.
    """
    given = [i for i, index in enumerate(indices) if index is not None]
    found = [index for index in indices if index is not None]
    if not accumulate or any(index.dtype == torch.bool for index in found):
        return NotImplemented
    others = [i for i in range(x.dim()) if i not in given]
    sizes, rest = [x.shape[i] for i in given], [x.shape[i] for i in others]
    row = None
    for index, size in zip(found, sizes, strict=True):
        index = torch.where(index < 0, index + size, index)
        row = index if row is None else row * size + index
    assert row is not None
    # torch puts the dimensions of the indices first, unless the indexed dimensions are adjacent
    adjacent = given == list(range(given[0], given[0] + len(given)))
    before = given[0] if adjacent else 0
    values = values.expand(*rest[:before], *row.shape, *rest[before:])
    places = list(range(before, before + row.dim()))
    values = values.permute(places + [i for i in range(values.dim()) if i not in places])
    turned = x.permute(given + others)
    table = turned.reshape(math.prod(sizes), math.prod(rest))
    summands = values.reshape(-1, math.prod(rest))
    total = _added_rows(table, row.reshape(-1), summands).reshape(turned.shape)
    return total.permute([(given + others).index(i) for i in range(x.dim())])


def empty_permuted(size: list[int], physical_layout: list[int], **options: Any) -> Tensor:
    """Zeros in place of uninitialised memory: graphs have no strides."""
    return torch.zeros(size, dtype=options.get("dtype"), device=options.get("device"))


def put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """``x`` with ``source`` written, or added, at places of the flattened tensor."""
    flat, place = x.reshape(-1), index.reshape(-1)
    place = torch.where(place < 0, place + x.numel(), place)
    write = aten.scatter_add.default if accumulate else aten.scatter.src
    result: Tensor = write(flat, 0, place, source.reshape(-1)).reshape(x.shape)
    return result


def _added_rows(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The table (n, width) with each row of ``values`` (m, width) added to row ``rows[i]``."""
    width = table.shape[1]
    if not isinstance(width, int):
        place = rows.unsqueeze(1).expand(values.shape)
        added: Tensor = aten.scatter_add.default(table, 0, place, values)
        return added
    # ScatterElements is about three times faster in one dimension than in two
    place = (rows.unsqueeze(1) * width + torch.arange(width, device=rows.device)).reshape(-1)
    flat: Tensor = aten.scatter_add.default(table.reshape(-1), 0, place, values.reshape(-1))
    return flat.reshape(table.shape)


def pow_scalar(x: Tensor, exponent: float) -> Any:
    """``x ** 1``, ``x ** 2`` and ``x ** 3`` without the power operator, which takes much longer.

    Returns ``NotImplemented`` for other exponents, which keeps the operator.
    """
    if exponent == 1:
        same: Tensor = aten.alias.default(x)
        return same
    if exponent == 2:
        return x * x
    if exponent == 3:
        return x * x * x
    return NotImplemented
