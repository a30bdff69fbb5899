"""Local examples: arrays in memory, or an ``.npz`` file with ``x`` and ``y``."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array


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
            DataError: no examples, or a shape, dtype, value or label that does not fit the model.
        """
        return Examples(*manifest.ranges.fit(self.x, self.y))

    def take(self, rows: Array) -> Examples:
        """The examples with these row numbers."""
        return Examples(self.x[rows], self.y[rows])

    def batches(self, size: int, rng: np.random.Generator | None = None) -> Iterator[Examples]:
        """Batches of ``size``, the last one shorter; shuffled when a generator is given."""
        order = np.arange(len(self)) if rng is None else rng.permutation(len(self))
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield Examples(self.x[rows], self.y[rows])
