"""The size of a merged step, and the bounds that it keeps within."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

_SHORT = 256
"""Texts of up to so many positions are merged with each other, whatever their lengths."""


class HasSize(Protocol):
    """A batch with a size."""

    @property
    def rows(self) -> int:
        """Number of examples."""

    @property
    def length(self) -> int:
        """Number of positions of each example, of a text; else 1."""

    @property
    def nbytes(self) -> int:
        """Size of the packed activations, in bytes."""


def bucket(length: int) -> int:
    """Number of the bucket of texts of a length; texts in one bucket are merged.

    The first bucket reaches to 256 positions, and each further one twice as far as the one before.
    """
    return max(length - 1, _SHORT - 1).bit_length()


@dataclass(frozen=True)
class StepSize:
    """Size of batches that are merged: texts are padded to the longest.

    Attributes:
        rows: number of examples.
        length: positions of the longest text.
        position_bytes: bytes that one position of every example takes together.
    """

    rows: int = 0
    length: int = 1
    position_bytes: float = 0.0

    def plus(self, batch: HasSize) -> StepSize:
        """Return the size with another batch."""
        return StepSize(
            self.rows + batch.rows,
            max(self.length, batch.length),
            self.position_bytes + batch.nbytes / batch.length,
        )


@dataclass(frozen=True)
class StepBounds:
    """Bounds of a merged step.

    Attributes:
        rows: largest number of rows.
        tokens: largest number of positions of all rows, padding included.
        bytes: largest size of the packed activations, padding included.
    """

    rows: int
    tokens: int
    bytes: int

    def allow(self, size: StepSize) -> bool:
        """Whether a step may be so large."""
        return (
            size.rows <= self.rows
            and size.rows * size.length <= self.tokens
            and size.position_bytes * size.length <= self.bytes
        )
