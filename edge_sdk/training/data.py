"""Local examples: arrays in memory, or an ``.npz`` file with ``x`` and ``y``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import DTYPES, Array


@dataclass(frozen=True)
class Examples:
    """Examples and their labels.

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
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["x"], file["y"])
        except FileNotFoundError:
            raise DataError(f"no data at {path}") from None
        except KeyError as error:
            raise DataError(f"{path} has no array {error}; it needs x and y") from None
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read as .npz with x and y: {error}") from error

    def fitted(self, manifest: Manifest) -> Examples:
        """The same examples in the dtypes of the step graphs.

        Raises:
            DataError: no examples, or shape, dtype or labels that do not fit the model.
        """
        spec = manifest.x
        if len(self.x) == 0 or not _matches(self.x.shape[1:], spec.shape[1:]):
            raise DataError(f"x has shape {list(self.x.shape)}, the model takes {list(spec.shape)}")
        longest = manifest.limits.get("seq")
        if longest is not None and self.x.shape[1] > longest:
            raise DataError(
                f"texts of {self.x.shape[1]} tokens; the bundle takes {longest} at most"
            )
        shape = self.x.shape if manifest.task == "tokens" else self.x.shape[:1]
        if self.y.shape != shape or self.y.dtype.kind not in "iu":
            raise DataError(
                f"y has shape {list(self.y.shape)} and dtype {self.y.dtype}; "
                f"it must hold integer labels of shape {list(shape)}"
            )
        lowest = -1 if manifest.task == "tokens" else 0
        if self.y.min() < lowest or self.y.max() >= manifest.classes:
            raise DataError(
                f"labels reach from {self.y.min()} to {self.y.max()}, "
                f"the model has the classes 0 to {manifest.classes - 1}"
            )
        if self.labels == 0:
            raise DataError("no position has a label: all of y is -1")
        dtype = DTYPES[spec.dtype]
        if self.x.dtype != dtype and not np.can_cast(self.x.dtype, dtype, "same_kind"):
            raise DataError(f"x is {self.x.dtype}, the model takes {spec.dtype}")
        x = np.ascontiguousarray(self.x, dtype)
        if dtype.kind == "f" and not np.isfinite(x).all():
            raise DataError("x holds values that are not finite (NaN or infinity)")
        return Examples(x, np.ascontiguousarray(self.y, np.int64))

    def take(self, rows: Array) -> Examples:
        """The examples with these row numbers."""
        return Examples(self.x[rows], self.y[rows])

    def batches(self, size: int, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """Batches of ``size``, the last one shorter; shuffled when a generator is given."""
        order = np.arange(len(self)) if rng is None else rng.permutation(len(self))
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield Examples(self.x[rows], self.y[rows])


def _matches(shape: tuple[int, ...], want: tuple[int | str, ...]) -> bool:
    """Whether a shape matches; a symbol stands for any size above zero."""
    return len(shape) == len(want) and all(
        size > 0 if isinstance(n, str) else size == n for size, n in zip(shape, want, strict=True)
    )
