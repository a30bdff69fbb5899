"""Sums and means, as products with constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from export.lowering.rewrites.groups import factor_of, groups_of
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
        groups = groups_of(n)
        if groups > 1:
            ones = torch.full((1, n // groups), 1.0, device=x.device)
            y = linear(y.reshape(-1, n // groups), ones)
        last = n if groups == 1 else groups
        weights = torch.full((1, last), 1 / n if mean else 1.0, device=x.device)
        y = linear(y.reshape(-1, last), weights)
    if head:
        columns = math.prod(lasting)
        if not _fixed(columns):
            raise Declined
        rows = math.prod(x.shape[:head])
        group = x.shape[head - 1] if head > 1 else factor_of(rows)
        y = _sum_of_rows(y.reshape(rows // group, group, columns))
        y = _sum_of_rows(y.reshape(1, rows // group, columns))
    return y.reshape(kept if keepdim else lasting)


def _sum_of_rows(y: Tensor) -> Tensor:
    """The sum of each matrix of (matrices, rows, columns), (matrices, 1, columns)."""
    if y.shape[1] == 1:
        return y
    ones = torch.full((y.shape[0], 1, y.shape[1]), 1.0, device=y.device)
    return torch.bmm(ones, y)


def _fixed(size: int | torch.SymInt) -> bool:
    return isinstance(size, int)
