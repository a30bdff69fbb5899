"""Arrays in shared memory, between the hub's process and the trunk's."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from edge_sdk.protocol.tensors import Array

_ALIGN = 64


class Arena:
    """One block of shared memory that arrays are laid into, and read from without a copy.

    Args:
        name: of an arena that exists, to map it; None makes one.
        size: bytes, of a new one.
    """

    def __init__(self, size: int = 0, name: str | None = None) -> None:
        self._memory = SharedMemory(name, create=name is None, size=size)
        self._owner = name is None

    @property
    def name(self) -> str:
        """Name to map it by."""
        return self._memory.name

    def write(self, arrays: Sequence[Array]) -> list[tuple[int, str, tuple[int, ...]]] | None:
        """Lay arrays one after the other from the start; None if they do not fit."""
        places, offset = [], 0
        for array in arrays:
            if offset + array.nbytes > self._memory.size:
                return None
            target: Array = np.ndarray(array.shape, array.dtype, self._memory.buf, offset)
            target[...] = array
            places.append((offset, array.dtype.str, array.shape))
            offset += -(-array.nbytes // _ALIGN) * _ALIGN
        return places

    def read(self, place: tuple[int, str, tuple[int, ...]]) -> Array:
        """An array that shares the arena's memory."""
        offset, dtype, shape = place
        return np.ndarray(shape, dtype, self._memory.buf, offset)

    def close(self) -> None:
        """Unmap it; the side that made it also removes it."""
        with contextlib.suppress(BufferError):  # an array in an exception's trace still maps it
            self._memory.close()
        if self._owner:
            self._memory.unlink()
