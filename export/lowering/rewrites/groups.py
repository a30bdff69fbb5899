"""Long sums in two stages: XNNPACK adds term by term, and errors grow with their number."""

from __future__ import annotations

import math

import torch

LONG = 2048
"""Number of terms that are added in one stage."""

_FEWEST = 64
"""Fewest terms of a group; with less, the second stage would be the long one."""


def groups_of(terms: int | torch.SymInt) -> int:
    """Into how many groups of equal size a sum of so many terms is divided; 1 for none.

    A number of terms that is not known, or has no fitting divisor, is not divided.
    """
    if not isinstance(terms, int) or terms <= LONG:
        return 1
    for groups in range(math.ceil(terms / LONG), terms // _FEWEST + 1):
        if terms % groups == 0:
            return groups
    return 1


def factor_of(size: int | torch.SymInt) -> int:
    """A factor of a size: of a symbolic one its number, such as 65 of 65 * batch."""
    if isinstance(size, int):
        return next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return int(size.node.expr.as_coeff_Mul()[0])
