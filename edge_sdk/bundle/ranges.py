"""The ranges that a bundle says of its examples, and the check of examples against them.

Every entry of examples uses this check: a device before it trains or sends, the hub for labels and
held-out examples, an export and a simulation for their data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import DTYPES, Array, TensorSpec

MAX_POSITIONS = 8192
"""Largest number of positions of a text: attention needs memory for their square."""


@dataclass(frozen=True)
class Ranges:
    """What examples may hold.

    Attributes:
        x: name, dtype and shape of the inputs.
        task: ``classes`` (a label per example) or ``tokens`` (a label per position).
        classes: number of classes, or of tokens; labels are ``0..classes-1``.
        highest: largest values of an integer ``x``, whose smallest value is 0: one for all of
            ``x``, or one for each of its columns; empty if there is no bound.
        longest: largest number of positions of a text.
    """

    x: TensorSpec
    task: str
    classes: int
    highest: tuple[int, ...]
    longest: int

    def fit(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Return examples in the dtypes of the step graphs, ``y`` in int64.

        Args:
            x: inputs (examples, ...).
            y: labels (examples,); (examples, positions) for a model of tokens, where -1 marks
                positions that do not count.

        Raises:
            DataError: no examples, or a shape, dtype, value or label that does not fit the model.
        """
        fitted = self.fit_x(x)
        shape = x.shape if self.task == "tokens" else x.shape[:1]
        if y.shape != shape or y.dtype.kind not in "iu":
            raise DataError(
                f"y has shape {list(y.shape)} and dtype {y.dtype}; "
                f"it must hold integer labels of shape {list(shape)}"
            )
        fault = self.label_fault(y)
        if fault is not None:
            raise DataError(fault)
        return fitted, np.ascontiguousarray(y, np.int64)

    def fit_x(self, x: Array) -> Array:
        """Return inputs (examples, ...) in the dtype of the step graphs.

        Raises:
            DataError: no examples, or a shape, dtype or value that does not fit the model.
        """
        if x.ndim == 0 or len(x) == 0 or not _matches(x.shape[1:], self.x.shape[1:]):
            raise DataError(f"x has shape {list(x.shape)}, the model takes {list(self.x.shape)}")
        if "seq" in self.x.shape and x.shape[1] > self.longest:
            raise DataError(f"texts of {x.shape[1]} tokens; the model takes {self.longest} at most")
        dtype = DTYPES[self.x.dtype]
        if x.dtype != dtype and not np.can_cast(x.dtype, dtype, "same_kind"):
            raise DataError(f"x is {x.dtype}, the model takes {self.x.dtype}")
        if dtype.kind in "iu":
            self._check_integers(x, np.iinfo(dtype))
            return np.ascontiguousarray(x, dtype)
        with np.errstate(over="ignore"):
            fitted = np.ascontiguousarray(x, dtype)
        finite = np.isfinite(fitted)
        if not finite.all():
            place = _first(~finite)
            raise DataError(
                f"{_name('x', place)} is {x[place]}; values must be finite in {self.x.dtype}"
            )
        return fitted

    def label_fault(self, y: Array) -> str | None:
        """Say which label is out of range, or that none counts; None if all are right.

        Args:
            y: integer labels (rows,), or (rows, positions).
        """
        lowest = -1 if self.task == "tokens" else 0
        wrong = (y < lowest) | (y >= self.classes)
        if wrong.any():
            place = _first(wrong)
            hint = "; -1 marks positions that do not count" if self.task == "tokens" else ""
            return (
                f"{_name('y', place)} is the label {y[place]}; the model has the classes 0 to "
                f"{self.classes - 1}{hint}"
            )
        return "no position has a label: all of y is -1" if y.max() < 0 else None

    def _check_integers(self, x: Array, dtype: np.iinfo[Any]) -> None:
        lowest, highest = dtype.min, np.asarray(dtype.max)
        if self.highest:
            lowest, highest = 0, np.asarray(self.highest)
        wrong = (x < lowest) | (x > highest)
        if wrong.any():
            place = _first(wrong)
            most = np.broadcast_to(highest, x.shape)[place]
            raise DataError(
                f"{_name('x', place)} is {x[place]}; the model takes {lowest} to {most}"
            )


def _first(wrong: Array) -> tuple[int, ...]:
    """The place of the first value that is wrong."""
    return tuple(int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))


def _name(array: str, place: tuple[int, ...]) -> str:
    """Name a value by its row, counted from 0, and its place in the row."""
    within = f" at {', '.join(map(str, place[1:]))}" if len(place) > 1 else ""
    return f"row {place[0]} of {array}{within}"


def _matches(shape: tuple[int, ...], want: tuple[int | str, ...]) -> bool:
    """Whether a shape matches; a symbol stands for any size above zero."""
    return len(shape) == len(want) and all(
        size > 0 if isinstance(n, str) else size == n for size, n in zip(shape, want, strict=True)
    )
