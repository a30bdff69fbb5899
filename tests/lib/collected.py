"""A source that grows while a device trains, and remembers which rows were read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples, Source


class Collected(Source):
    """Rows that an app collects in memory. Its snapshots note what is read in ``seen``.

    Args:
        pool: the rows that there may be.
        here: numbers of those that are here, which are their keys; a test changes it.
        seen: numbers of the rows of every read, in order.
    """

    def __init__(
        self, pool: Examples, here: Sequence[int], seen: list[list[int]] | None = None
    ) -> None:
        self.pool, self.here = pool, list(here)
        self.seen: list[list[int]] = [] if seen is None else seen

    def __len__(self) -> int:
        return len(self.here)

    def read(self, rows: Array) -> Examples:
        numbers = [self.here[row] for row in rows]
        self.seen.append(numbers)
        return self.pool.read(np.array(numbers, np.int64))

    def keys(self) -> Array:
        return np.array(self.here, np.int64)

    def times(self) -> Array:
        return np.array(self.here, np.float64)

    def where(self, row: int) -> str:
        return f"the app's row {self.here[row]}"

    def snapshot(self) -> Source:
        return Collected(self.pool, self.here, self.seen)
