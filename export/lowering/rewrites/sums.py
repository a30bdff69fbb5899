"""Sums and means, as products with constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from export.lowering.rewrites.rule import Declined


def sum_(
    x: Tensor, dims: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """A sum over the last or the first dimensions, or both, as a product with ones."""
    return _reduce(x, dims, keepdim, dtype, mean=False)


def mean(
    x: Tensor, dims: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """A mean over the last dimensions, as a product with a constant."""
    return _reduce(x, dims, keepdim, dtype, mean=True)


def _reduce(x: Tensor, dims: list[int] | None, keepdim: bool, dtype: Any, mean: bool) -> Tensor:
    wanted = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
    if x.dtype != torch.float32 or dtype not in (None, x.dtype) or x.dim() == 0:
        raise Declined
    head = 0
    while head in wanted:
        head += 1
    tail = x.dim()
    while tail > head and tail - 1 in wanted:
        tail -= 1
    lasting = x.shape[head:tail]
    rest = x.shape[tail:]
    if wanted != [*range(head), *range(tail, x.dim())] or not all(_fixed(n) for n in rest):
        raise Declined
    if mean and head:
        raise Declined
    kept = [1 if d in wanted else n for d, n in enumerate(x.shape)]
    y = x
    if rest:
        n = math.prod(rest)
        weights = torch.full((1, n), 1 / n if mean else 1.0, device=x.device)
        y = linear(y.reshape(-1, n), weights)
    if head:
        columns = math.prod(lasting)
        if not _fixed(columns):
            raise Declined
        rows = math.prod(x.shape[:head])
        group = x.shape[head - 1] if head > 1 else _factor(rows)
        # in two stages: XNNPACK adds row by row, and errors grow with their number
        y = _sum_of_rows(y.reshape(rows // group, group, columns))
        y = _sum_of_rows(y.reshape(1, rows // group, columns))
    return y.reshape(kept if keepdim else lasting)


def _factor(size: int | torch.SymInt) -> int:
    """A factor of a size: of a symbolic one its number, such as 65 of 65 * batch."""
    if isinstance(size, int):
        return next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return int(size.node.expr.as_coeff_Mul()[0])


def _sum_of_rows(y: Tensor) -> Tensor:
    """The sum of each matrix of (matrices, rows, columns), (matrices, 1, columns)."""
    if y.shape[1] == 1:
        return y
    ones = torch.full((y.shape[0], 1, y.shape[1]), 1.0, device=y.device)
    return torch.bmm(ones, y)


def _fixed(size: int | torch.SymInt) -> bool:
    return isinstance(size, int)
