"""Local data: sources of rows, and examples in memory.

A *source* holds rows, each an input with its label, wherever they are kept. It reads the rows that
it is asked for and no others. A source may grow: :meth:`Source.snapshot` is the rows as they are
now, and what is read from a snapshot does not depend on what comes later.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.arrays import check_rows, read_arrays

_FIRST = 64
"""Rows of a source that are checked against the model before training begins."""


class Source(ABC):
    """Rows with labels, numbered from 0 on. A source of your own defines ``len`` and ``read``.

    A source whose rows may become more or fewer also defines :meth:`snapshot`, and :meth:`keys`,
    since the number of a row then says nothing. Everything else is read from snapshots only.
    Methods are called from several threads, and may block.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def read(self, rows: Array) -> Examples:
        """The rows with these numbers, in this order.

        Rows that have been deleted since the snapshot are left out.

        Args:
            rows: numbers of rows, (rows,) integers.

        Raises:
            DataError: a row cannot be read; the message names it as :meth:`where` does.
        """

    def keys(self) -> Array:
        """A number for each row that stays with it, whatever comes and goes, (rows,) int64.

        It decides which rows are kept back. Rows with equal keys are on the same side. By default
        the number of the row, which is right for a source that never changes.
        """
        return np.arange(len(self))

    def times(self) -> Array:
        """When each row came, in seconds since 1970, (rows,) float64.

        Raises:
            DataError: the source does not know.
        """
        raise DataError(f"the rows of {type(self).__name__} have no time, so they have no age")

    def where(self, row: int) -> str:
        """What to call a row in an error, such as its file and line."""
        return f"row {row}"

    def snapshot(self) -> Source:
        """The rows as they are now; the source itself if it never changes."""
        return self

    def fitted(self, manifest: Manifest) -> Source:
        """The same rows in the dtypes of the step graphs. Each is checked when it is read.

        A text without a label that counts is left out when it is read. Rows that are flat take
        the shape of the model's inputs if they have as many values.

        Raises:
            DataError: there are no rows, or one of the first does not fit the model.
        """
        fitted = _Fitted(self, manifest)
        fitted.check_first()
        return fitted

    def batches(self, size: int, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """Batches of ``size``, the last one shorter; shuffled when a generator is given."""
        order = np.arange(len(self)) if rng is None else rng.permutation(len(self))
        for start in range(0, len(self), size):
            batch = self.read(order[start : start + size])
            if len(batch):
                yield batch


@dataclass(frozen=True)
class Examples(Source):
    """Examples in memory and their labels.

    Attributes:
        x: inputs (examples, ...), dtype and shape as the model takes them.
        y: labels (examples,), integers ``0..classes-1``; (examples, positions) for a model of
            tokens, where -1 marks positions that do not count.
    """

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labels(self) -> int:
        """Number of labels that count."""
        return int((self.y >= 0).sum())

    @classmethod
    def from_npz(cls, path: str | Path) -> Examples:
        """Read ``x`` and ``y`` from an ``.npz`` file; :class:`DataError` if that fails."""
        arrays = read_arrays(Path(path))
        check_rows(arrays["x"], arrays["y"], str(path))
        return cls(np.array(arrays["x"]), np.array(arrays["y"]))

    def read(self, rows: Array) -> Examples:
        """The examples with these row numbers."""
        return Examples(self.x[rows], self.y[rows])

    def fitted(self, manifest: Manifest) -> Examples:
        """The same examples in the dtypes of the step graphs.

        Raises:
            DataError: no examples, or a shape, dtype, value or label that does not fit the model.
        """
        return Examples(*manifest.ranges.fit(self.x, self.y))


class _Fitted(Source):
    """The rows of a source, in the dtypes of the step graphs."""

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self._source, self._manifest = source, manifest

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: Array) -> Examples:
        examples = self._prepared(rows)
        if len(examples) == 0:
            return examples
        try:
            return examples.fitted(self._manifest)
        except DataError as error:
            raise self._named(rows, error) from error

    def keys(self) -> Array:
        return self._source.keys()

    def times(self) -> Array:
        return self._source.times()

    def where(self, row: int) -> str:
        return self._source.where(row)

    def snapshot(self) -> Source:
        return _Fitted(self._source.snapshot(), self._manifest)

    def check_first(self) -> None:
        """Raise :class:`DataError` if there are no rows, or one of the first does not fit."""
        now = self.snapshot()
        if len(now) == 0:
            raise DataError("the data has no rows")
        now.read(np.arange(min(len(now), _FIRST)))

    def _prepared(self, rows: Array) -> Examples:
        """Rows without texts that have no label that counts, and with flat inputs in shape."""
        examples = self._source.read(rows)
        x, y = examples.x, examples.y
        if self._manifest.task == "tokens" and y.ndim == 2:
            return examples.read(np.flatnonzero((y >= 0).any(1)))
        shape = self._manifest.x.shape[1:]
        fixed = [n for n in shape if isinstance(n, int)]
        if x.ndim == 2 and len(shape) == len(fixed) > 1 and x.shape[1] == math.prod(fixed):
            return Examples(x.reshape(len(x), *fixed), y)
        return examples

    def _named(self, rows: Array, error: DataError) -> DataError:
        """The error of the first row that does not fit, with its place."""
        for row in rows:
            one = self._prepared(np.array([row]))
            try:
                if len(one):
                    one.fitted(self._manifest)
            except DataError as own:
                return DataError(f"{self.where(int(row))}: {str(own).removeprefix('row 0 of ')}")
        return error


class Selection(Source):
    """Some rows of a source.

    Args:
        source: the source.
        rows: numbers of the rows in it, (rows,) int64.
    """

    def __init__(self, source: Source, rows: Array) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Array) -> Examples:
        return self._source.read(self._rows[rows])

    def keys(self) -> Array:
        keys: Array = self._source.keys()[self._rows]
        return keys

    def times(self) -> Array:
        times: Array = self._source.times()[self._rows]
        return times

    def where(self, row: int) -> str:
        return self._source.where(int(self._rows[row]))
