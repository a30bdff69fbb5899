"""Tables: which column holds what, and rows of cells as examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.images import decode_bytes
from edge_sdk.training.data import Examples

LABELS = ("y", "label")
"""Names of the column of labels."""

Row = Sequence[Any]
"""The cells of a row: numbers, text, bytes, or lists of numbers."""


def key_of(content: bytes) -> int:
    """The key of a row from what identifies it: a hash of 64 bits, signed."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class Columns:
    """What the columns of a table hold, as numbers of columns.

    Labels are in the column ``y`` or ``label``. Inputs are in the column ``x``, as a JSON list of
    numbers, or as the bytes of an ``.npy`` file or of an image. Without it all other columns are
    numbers of a flat input, in their order. ``id`` identifies a row, ``time`` says when it came, in
    seconds since 1970; neither is an input.

    Attributes:
        names: names of all columns.
        label: column of labels.
        x: column of whole inputs; None if ``features`` has them.
        features: columns of the numbers of an input.
        id: column of the key; None if there is none.
        time: column of the time; None if there is none.
    """

    names: tuple[str, ...]
    label: int
    x: int | None
    features: tuple[int, ...]
    id: int | None
    time: int | None

    @classmethod
    def of(cls, names: Sequence[str], where: str) -> Columns:
        """The columns with these names; :class:`DataError` if labels or inputs are missing."""
        place = {name: number for number, name in enumerate(names)}
        if len(place) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise DataError(f"{where} has the column {twice!r} twice")
        labels = [place[name] for name in LABELS if name in place]
        if len(labels) != 1:
            found = "both of them" if labels else f"only {', '.join(map(repr, names)) or 'none'}"
            raise DataError(f"{where} needs one column of labels, y or label; it has {found}")
        taken = {labels[0], place.get("id"), place.get("time")}
        features = () if "x" in place else tuple(n for n in place.values() if n not in taken)
        if "x" not in place and not features:
            raise DataError(f"{where} has no column of inputs, neither x nor any of numbers")
        ids = place.get("id"), place.get("time")
        return cls(tuple(names), labels[0], place.get("x"), features, *ids)

    def examples(self, rows: Sequence[Row], where: Callable[[int], str]) -> Examples:
        """Rows of cells as examples.

        Texts, which have a list of labels, may differ in length: they are padded at the end to the
        longest of these rows, inputs with 0 and labels with -1.

        Args:
            rows: cells of each row, as many as there are columns.
            where: what to call a row in an error, by its number in ``rows``.

        Raises:
            DataError: a cell is no number, no list of numbers, or empty; or inputs differ in shape.
        """
        if not rows:
            return Examples(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
        x = [self._input(row, where(n)) for n, row in enumerate(rows)]
        y = [self._labels(row, where(n)) for n, row in enumerate(rows)]
        if all(labels.ndim for labels in y):
            for n, (tokens, labels) in enumerate(zip(x, y, strict=True)):
                if tokens.shape[:1] != labels.shape:
                    raise DataError(
                        f"{where(n)}: x has shape {list(tokens.shape)} and y {list(labels.shape)}; "
                        "there must be a label for each position"
                    )
            longest = max(map(len, y))
            x, y = [_padded(a, longest, 0) for a in x], [_padded(a, longest, -1) for a in y]
        return Examples(_stacked(x, "x", where), _stacked(y, "y", where))

    def time_of(self, row: Row, where: str) -> float:
        """When a row came; 0 if there is no column of times."""
        return 0.0 if self.time is None else float(self._number(row, self.time, where))

    def _input(self, row: Row, where: str) -> Array:
        if self.x is None:
            return np.array([self._number(row, n, where) for n in self.features])
        return self._array(row, self.x, where)

    def _labels(self, row: Row, where: str) -> Array:
        cell = row[self.label]
        if isinstance(cell, list | bytes) or (isinstance(cell, str) and cell.startswith("[")):
            return self._array(row, self.label, where)
        label = self._number(row, self.label, where)
        if label != int(label):
            raise DataError(f"{where}: the label is {label}; labels are integers")
        return np.array(int(label))

    def _number(self, row: Row, column: int, where: str) -> int | float:
        cell, name = row[column], self.names[column]
        if cell is None or cell == "":
            raise DataError(f"{where}: {name} is empty")
        if isinstance(cell, str):
            try:
                return int(cell)
            except ValueError:
                pass
            try:
                cell = float(cell)
            except ValueError:
                raise DataError(f"{where}: {name} is {cell[:40]!r}, which is no number") from None
        if isinstance(cell, bool) or not isinstance(cell, int | float):
            raise DataError(f"{where}: {name} is a {type(cell).__name__}; it must be a number")
        if not np.isfinite(cell):
            raise DataError(f"{where}: {name} is {cell}; it must be a finite number")
        return cell

    def _array(self, row: Row, column: int, where: str) -> Array:
        cell, name = row[column], self.names[column]
        if isinstance(cell, bytes):
            return decode_bytes(cell, f"{where}: {name}")
        try:
            numbers = json.loads(cell) if isinstance(cell, str) else cell
            array = np.array(numbers if isinstance(numbers, list) else None)
        except (ValueError, RecursionError):
            array = np.array(None)
        if array.dtype.kind not in "iuf" or array.ndim == 0:
            raise DataError(
                f"{where}: {name} is no list of numbers, nor lists of equal length of them"
            )
        return array


def _padded(array: Array, size: int, value: int) -> Array:
    """An array with ``value`` appended until it has ``size`` entries."""
    widths = [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(array, widths, constant_values=value)


def _stacked(arrays: Sequence[Array], name: str, where: Callable[[int], str]) -> Array:
    for n, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"{where(n)}: {name} has shape {list(array.shape)}, {where(0)} has "
                f"{list(arrays[0].shape)}; all rows must have the same"
            )
    stacked: Array = np.stack(arrays)
    return stacked
