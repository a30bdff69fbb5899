"""Batches of texts of similar length, so that padding costs little compute and traffic.

A text ends at its last label that counts. For a causal model the positions after it have no effect;
for one that reads in both directions they are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples, Source

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


def batches(data: Source, size: int, rng: np.random.Generator | None = None) -> Iterator[Examples]:
    """Batches of texts of similar length, each cut to its longest text.

    Texts are read in windows of :data:`WINDOW` batches and sorted by length within each. With a
    generator, texts are shuffled before, and the batches of a window come in random order: batches
    differ from epoch to epoch, and there is little padding. Texts without a label that counts are
    left out.

    Args:
        data: texts with labels (examples, positions).
        size: texts in a batch; the last batch of a window may have fewer.
        rng: shuffles the texts; None for no shuffling.
    """
    rows = np.arange(len(data)) if rng is None else rng.permutation(len(data))
    for start in range(0, len(rows), WINDOW * size):
        near = data.read(rows[start : start + WINDOW * size])
        if len(near) == 0:
            continue
        ends = lengths(near.y)
        counted = np.flatnonzero(ends)
        counted = counted[np.argsort(ends[counted], kind="stable")]
        groups = [counted[i : i + size] for i in range(0, len(counted), size)]
        order = range(len(groups)) if rng is None else rng.permutation(len(groups))
        for number in order:
            group = groups[number]
            yield Examples(*trim(near.x[group], near.y[group]))
