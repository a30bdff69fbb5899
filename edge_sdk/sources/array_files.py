"""Arrays in files as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.arrays import check_rows, map_array, read_arrays
from edge_sdk.training.data import Examples, Source


class ArrayFiles(Source):
    """The arrays ``x`` and ``y`` of files, of which only the rows that are asked for are read.

    The files must not change. What is compressed is read whole: see
    :func:`edge_sdk.sources.arrays.read_arrays`.

    Args:
        x: inputs (rows, ...).
        y: labels (rows,) or (rows, positions).
        name: what to call the files in errors.

    Raises:
        DataError: ``x`` and ``y`` do not have as many rows.
    """

    def __init__(self, x: Array, y: Array, name: str) -> None:
        check_rows(x, y, name)
        self._x, self._y, self._name = x, y, name

    @classmethod
    def from_npz(cls, path: str | Path) -> Self:
        """The arrays ``x`` and ``y`` of an ``.npz`` file; :class:`DataError` if that fails."""
        arrays = read_arrays(Path(path))
        return cls(arrays["x"], arrays["y"], str(path))

    @classmethod
    def from_npy(cls, folder: str | Path) -> Self:
        """``x.npy`` and ``y.npy`` in a folder; :class:`DataError` if one cannot be read."""
        x, y = (map_array(Path(folder) / name) for name in ("x.npy", "y.npy"))
        return cls(x, y, str(folder))

    def __len__(self) -> int:
        return len(self._x)

    def read(self, rows: Array) -> Examples:
        return Examples(np.asarray(self._x[rows]), np.asarray(self._y[rows]))

    def where(self, row: int) -> str:
        return f"{self._name}, row {row}"
