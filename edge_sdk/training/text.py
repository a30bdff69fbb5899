"""Batches of texts of similar length, so that padding costs little compute and traffic.

A text ends at its last label that counts. For a causal model the positions after it have no effect;
for one that reads in both directions they are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples

WINDOW = 8
"""Batches within which texts are sorted by length: more means less padding and less shuffling."""


def lengths(y: Array) -> Array:
    """Number of positions up to the last label that counts, (rows,); 0 for a text without any.

    Args:
        y: labels (rows, positions), -1 where a position does not count.
    """
    ends: Array = ((y >= 0) * np.arange(1, y.shape[1] + 1)).max(1)
    return ends


def trim(x: Array, y: Array) -> tuple[Array, Array]:
    """A batch cut to the length of its longest text.

    Args:
        x: tokens (rows, positions).
        y: labels (rows, positions), at least one of which counts.

    Returns:
        ``x`` and ``y``, contiguous, with fewer positions.
    """
    longest = lengths(y).max()
    return np.ascontiguousarray(x[:, :longest]), np.ascontiguousarray(y[:, :longest])


def batches(
    data: Examples, size: int, rng: np.random.Generator | None = None
) -> Iterator[Examples]:
    """Batches of texts of similar length, each cut to its longest text.

    With a generator, texts are shuffled, then sorted by length within windows of :data:`WINDOW`
    batches, and the batches of a window come in random order: batches differ from epoch to epoch,
    and there is little padding. Without a generator, all texts are sorted by length. Texts without
    a label that counts are left out.

    Args:
        data: texts with labels (examples, positions).
        size: texts in a batch; the last batch of a window may have fewer.
        rng: shuffles the texts; None for no shuffling.
    """
    ends = lengths(data.y)
    rows = np.flatnonzero(ends)
    window = len(rows) if rng is None else WINDOW * size
    if rng is not None:
        rows = rng.permutation(rows)
    for start in range(0, len(rows), max(window, 1)):
        near = rows[start : start + window]
        near = near[np.argsort(ends[near], kind="stable")]
        groups = [near[i : i + size] for i in range(0, len(near), size)]
        order = range(len(groups)) if rng is None else rng.permutation(len(groups))
        for number in order:
            group = groups[number]
            yield Examples(*trim(data.x[group], data.y[group]))
