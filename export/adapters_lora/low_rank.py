"""Averages low-rank adapters as products (HLoRA, https://arxiv.org/abs/2503.00813).

The adapter of a module is the matrix ``scale * B @ A``. The mean of A times the mean of B is not
the mean of the products, and matrices A of different ranks have no mean. So the products are
averaged, and an SVD reduces the mean to a rank.

Shapes: ``O`` outputs and ``I`` inputs of the module, ``R`` rank, ``S`` sum of the copies' ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from edge_sdk.protocol.tensors import Array

_SIZE = 1 / math.sqrt(3)
"""Norm of a row of A at PEFT's initialisation, which is uniform with variance 1 / (3 I)."""

_CONDITION = 1e3
"""Largest condition number of a change of basis: float32 has 7 digits."""

_GROWTH = 2.0
"""Largest growth of the norm of B over the copies' B in a kept basis. If that basis hardly
contains a direction of the mean, B, and the next step with it, would become huge."""

_PRESENT = 1e-8
"""Smallest singular value, relative to the norm of the rows, that counts as a direction."""


class AdapterCopy(NamedTuple):
    """One trained copy of a module's adapter.

    Attributes:
        B: (out, rank).
        A: (rank, in).
        scale: factor of the product, ``alpha / rank``.
        weight: weight in the mean, usually the number of samples that the copy was trained on.
    """

    B: Array
    A: Array
    scale: float
    weight: float


def average(
    copies: Sequence[AdapterCopy | tuple[Array, Array, float, float]],
    rank: int,
    scale: float,
    near: Array | None = None,
) -> tuple[Array, Array]:
    """The best approximation of the weighted mean of the copies' products by an adapter of a rank.

    The approximation is the best in the Frobenius norm. Its basis is the one nearest to ``near``,
    so that optimizer slots for that basis remain valid. If ``near`` is None and all copies have
    the rank, the mean of their A replaces it, and equal copies give the same adapter again.
    Without such a basis, or if it lacks a direction of the mean, the rows of A are orthogonal and
    have the norm of PEFT's initialisation. A is never zero, even if every B is. The product
    (out, in) is never computed.

    Args:
        copies: finite copies of one module's adapter; weights above zero with any sum.
        rank: rank of the result.
        scale: factor of the result's product.
        near: an A (rank, in) whose basis the result keeps as far as possible.

    Returns:
        B (out, rank) and A (rank, in), in the copies' dtype.

    Raises:
        ValueError: there are no copies, a weight is not above zero, the shapes do not fit each
            other, or the rank is above the number of inputs or outputs.
    """
    adapters = [AdapterCopy(*copy) for copy in copies]
    _check(adapters, rank)
    total = sum(copy.weight for copy in adapters)
    shares = [copy.weight / total for copy in adapters]
    scaled = [s * c.scale * c.B.astype(np.float64) for s, c in zip(shares, adapters, strict=True)]
    left_OS = np.hstack(scaled)
    right_SI = np.vstack([copy.A.astype(np.float64) for copy in adapters])

    mean_RI = None if near is None else near.astype(np.float64)
    if mean_RI is None and all(len(copy.A) == rank for copy in adapters):
        mean_RI = np.tensordot(shares, right_SI.reshape(len(adapters), rank, -1), 1)
    sources = [right_SI] if mean_RI is None else [mean_RI, right_SI]
    basis_RI = _completed(_leading(left_OS, right_SI, rank), sources, rank)
    image_OR = left_OS @ (right_SI @ basis_RI.T)

    A: Array = _SIZE * basis_RI
    B: Array = image_OR / (_SIZE * scale)
    if mean_RI is not None:
        nearest_RR = mean_RI @ basis_RI.T
        if np.linalg.cond(nearest_RR) <= _CONDITION:
            near_B = np.linalg.solve(nearest_RR.T, image_OR.T).T / scale
            largest = max(np.linalg.norm(c.scale * c.B) for c in adapters) / scale
            if np.linalg.norm(near_B) <= _GROWTH * largest:
                A, B = nearest_RR @ basis_RI, near_B
    return B.astype(adapters[0].B.dtype), A.astype(adapters[0].A.dtype)


def reduce(B: Array, A: Array, rank: int) -> tuple[Array, Array]:
    """Change the rank of an adapter and keep its product ``B @ A`` as far as the rank allows.

    A lower rank keeps the leading part of the product. A higher rank adds orthogonal rows to A and
    zero columns to B. If the scale changes with the rank, multiply the new B by the old scale over
    the new one.

    Args:
        B: (out, old rank).
        A: (old rank, in).
        rank: new rank.

    Returns:
        B (out, rank) and A (rank, in).

    Raises:
        ValueError: the shapes do not fit each other, or the rank is above the number of inputs or
            outputs.
    """
    copy = AdapterCopy(B, A, 1.0, 1.0)
    if rank < len(A):
        return average([copy], rank, 1.0)
    _check([copy], rank)
    added = rank - len(A)
    rows = A.astype(np.float64)
    known = _completed(np.empty((0, A.shape[1])), [rows], len(A), rest=False)
    new = _completed(known, [], len(known) + added)[len(known) :]
    columns = np.zeros((len(B), added), B.dtype)
    return np.hstack([B, columns]), np.vstack([A, (_SIZE * new).astype(A.dtype)])


_FACTOR = re.compile(r"(?P<module>[^/]+)\.lora_(?P<factor>[AB])\.(?P<adapter>[^./]+)\.weight")


def adapter_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of the names of A and B of each adapter in a state.

    Names of optimizer slots, such as ``momentum/block.0...``, are left out.

    Raises:
        ValueError: an A has no B, or a B has no A.
    """
    known = dict.fromkeys(names)
    pairs: dict[tuple[str, str], None] = {}
    for name in known:
        if factor := _FACTOR.fullmatch(name):
            stem, end = f"{factor['module']}.lora_", f".{factor['adapter']}.weight"
            pair = f"{stem}A{end}", f"{stem}B{end}"
            if not known.keys() >= set(pair):
                raise ValueError(f"{name} comes alone; an adapter is {' and '.join(pair)}")
            pairs[pair] = None
    return list(pairs)


def _check(copies: Sequence[AdapterCopy], rank: int) -> None:
    if not copies:
        raise ValueError("there are no copies to average")
    outputs, inputs = copies[0].B.shape[0], copies[0].A.shape[-1]
    for B, A, _, weight in copies:
        if B.shape != (outputs, len(A)) or A.shape != (len(A), inputs):
            raise ValueError(
                f"B is {B.shape} and A {A.shape}; "
                f"they must be ({outputs}, rank) and (rank, {inputs})"
            )
        if not weight > 0:
            raise ValueError(f"the weight of a copy is {weight}; it must be above 0")
    if not 1 <= rank <= min(outputs, inputs):
        raise ValueError(f"rank {rank} does not fit a module that is {outputs} x {inputs}")


def _leading(left_OS: Array, right_SI: Array, rank: int) -> Array:
    """The leading right singular vectors of ``left @ right``, as rows.

    There are ``rank`` rows, or fewer if the numerical rank of the product is lower.
    """
    small_left = np.linalg.qr(left_OS, "r")
    Q_IK, small_right = np.linalg.qr(right_SI.T)
    _, sizes, directions = np.linalg.svd(small_left @ small_right.T)
    rounding = np.finfo(np.float64).eps * left_OS.shape[1]
    rounding *= np.linalg.norm(small_left) * np.linalg.norm(small_right)
    found = min(rank, int((sizes > rounding).sum()))
    leading: Array = directions[:found] @ Q_IK.T
    return leading


def _completed(basis: Array, sources: Sequence[Array], rank: int, *, rest: bool = True) -> Array:
    """Complete orthonormal rows to ``rank`` with the main directions of the sources, in order.

    If the sources do not have enough directions, ``rest`` adds random ones from a fixed seed.
    """
    inputs = basis.shape[1]
    drawn = np.random.default_rng(0).standard_normal((rank, inputs))
    for source in [*sources, drawn] if rest else sources:
        if len(basis) == rank:
            break
        remainder = source - (source @ basis.T) @ basis
        _, sizes, directions = np.linalg.svd(remainder, full_matrices=False)
        present = directions[sizes > _PRESENT * np.linalg.norm(source)]
        basis = np.vstack([basis, present[: rank - len(basis)]])
        basis = np.linalg.qr(basis.T)[0].T  # the remainder is orthogonal up to rounding only
    return basis
