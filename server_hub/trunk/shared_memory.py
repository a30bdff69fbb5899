"""Messages between two processes whose arrays go through shared memory instead of the pipe.

A message is anything that can be pickled. Its arrays are laid into one block of shared memory
(pickle protocol 5, out-of-band buffers), whatever object they are part of; the pipe carries the
rest. A message whose arrays do not fit goes in several fills of the block.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Array, State

_SYSTEM = Path("/dev/shm")
"""Where Linux keeps shared memory."""

_ALIGN = 64
"""Bytes that an array starts at a multiple of."""


class SharedMemoryPipe:
    """One end of a pipe with a block of shared memory. Both ends take turns: ask, answer.

    Args:
        connection: this end of the pipe.
        size: bytes of a new block, for the end that makes it.
        name: name of the block that the other end has made.
    """

    def __init__(self, connection: Connection, size: int = 0, name: str | None = None) -> None:
        self._connection = connection
        self._memory = _reserved(size) if name is None else SharedMemory(name)
        self._owner = name is None
        self._closed = False
        assert self._memory.buf is not None
        self._block = self._memory.buf

    @property
    def name(self) -> str:
        """Name of the block, for the other end."""
        return self._memory.name

    @property
    def block(self) -> memoryview:
        """The shared memory."""
        return self._block

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        """Whether a message is there, after waiting for it; None waits without limit."""
        return self._connection.poll(timeout_s)

    def send(self, message: Any) -> None:
        """Send a message; returns once its last arrays are in the block."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        arrays = [memoryview(b.raw()) for b in buffers]
        sizes = [a.nbytes for a in arrays]
        fills = self._fills(sizes)
        for number, fill in enumerate(fills):
            if number:
                self._connection.recv()  # the other end has taken the last fill
            for piece in fill:
                source = arrays[piece.array][piece.start : piece.start + piece.size]
                self._block[piece.place : piece.place + piece.size] = source
            self._connection.send(None if number else (head, sizes))

    def receive(self, copy: bool) -> Any:
        """The next message.

        Args:
            copy: whether the message owns its arrays. Otherwise they may be views of the block,
                which hold until the next call of either end.

        Raises:
            EOFError, OSError: the other end has gone.
        """
        head, sizes = self._connection.recv()
        fills = self._fills(sizes)
        if len(fills) == 1 and not copy:
            views = [self._block[p.place : p.place + p.size] for p in fills[0]]
            return pickle.loads(head, buffers=views)
        arrays = [bytearray(size) for size in sizes]
        for number, fill in enumerate(fills):
            if number:
                self._connection.send(None)
                self._connection.recv()
            for piece in fill:
                taken = self._block[piece.place : piece.place + piece.size]
                arrays[piece.array][piece.start : piece.start + piece.size] = taken
        return pickle.loads(head, buffers=arrays)

    def _fills(self, sizes: list[int]) -> list[list[_Piece]]:
        """Which pieces of which arrays are in the block together, fill by fill; at least one."""
        fills: list[list[_Piece]] = [[]]
        place = 0
        for array, size in enumerate(sizes):
            start, whole = 0, False
            while not whole:
                if place >= self._memory.size:
                    fills.append([])
                    place = 0
                part = min(size - start, self._memory.size - place)
                fills[-1].append(_Piece(array, start, part, place))
                place += -(-part // _ALIGN) * _ALIGN
                start += part
                whole = start == size
        return fills

    def close(self) -> None:
        """Close this end; the end that made the block also removes it. Twice is as good."""
        if self._closed:
            return
        self._closed = True
        self._connection.close()
        del self._block
        with contextlib.suppress(BufferError):  # an array in an exception's trace still maps it
            self._memory.close()
        if self._owner:
            self._memory.unlink()


def _reserved(size: int) -> SharedMemory:
    """A new block whose pages exist: none can be missing when it is written to.

    Raises:
        ConfigError: there is no room for it.
    """
    try:
        memory = SharedMemory(create=True, size=size)
    except (OSError, OverflowError, ValueError) as error:
        raise _no_room(size) from error
    file = _SYSTEM / memory.name
    try:
        if file.exists():  # where there is no such file, the system bounds shared memory otherwise
            descriptor = os.open(file, os.O_RDWR)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
    except OSError as error:
        memory.close()
        memory.unlink()
        raise _no_room(size) from error
    return memory


def _no_room(size: int) -> ConfigError:
    free = shutil.disk_usage(_SYSTEM).free if _SYSTEM.exists() else 0
    return ConfigError(
        f"there is no room for a block of {size / 2**20:.0f} MiB of shared memory, "
        f"{free / 2**20:.0f} MiB are free in {_SYSTEM}; set arena_mb of [trunk] lower, or make "
        f"{_SYSTEM} larger (of a container: --shm-size)"
    )


@dataclass(frozen=True)
class _Piece:
    """A part of an array in the block: ``size`` bytes from ``start`` on lie at ``place``."""

    array: int
    start: int
    size: int
    place: int


@dataclass(frozen=True)
class StateDelta:
    """Some states, without the tensors that the other end has already.

    Attributes:
        numbers: by key of a state, the number of each tensor by name.
        new: tensors that the other end does not have yet, by number.
        forget: numbers of tensors that the other end need not keep any longer.
    """

    numbers: dict[int, dict[str, int]]
    new: dict[int, Array]
    forget: list[int]


class StateSender:
    """Says what has changed from one state to the next.

    A tensor is known by its array: whoever changes a tensor makes a new array, as
    :class:`server_hub.aggregation.layer_store.LayerStore` does. The other end keeps the tensors of
    the last two calls, one for training and one for answers.
    """

    def __init__(self) -> None:
        # by the array's id, which is its own as long as the array is kept here
        self._last: dict[int, tuple[int, Array]] = {}
        self._before: dict[int, tuple[int, Array]] = {}
        self._numbers = itertools.count()

    def delta(self, states: Mapping[int, State]) -> StateDelta:
        """Several states that are sent together, by key; an array is sent once."""
        used: dict[int, tuple[int, Array]] = {}
        new: dict[int, Array] = {}
        numbers: dict[int, dict[str, int]] = {}
        for key, state in states.items():
            numbers[key] = {}
            for name, array in state.items():
                entry = used.get(id(array)) or self._last.get(id(array))
                entry = entry or self._before.get(id(array))
                if entry is None:
                    entry = next(self._numbers), array
                    new[entry[0]] = array
                used[id(array)] = entry
                numbers[key][name] = entry[0]
        kept = used.keys() | self._last.keys()
        forget = [number for i, (number, _) in self._before.items() if i not in kept]
        self._before, self._last = self._last, used
        return StateDelta(numbers, new, forget)


class StateReceiver:
    """Puts states together from what has changed."""

    def __init__(self) -> None:
        self._tensors: dict[int, Array] = {}

    def states(self, delta: StateDelta) -> dict[int, State]:
        """The states by key; states with the same tensors are one object."""
        for number, array in delta.new.items():
            self._tensors[number] = np.array(array)
        found: dict[tuple[tuple[str, int], ...], State] = {}
        states = {}
        for key, numbers in delta.numbers.items():
            identity = tuple(numbers.items())
            if identity not in found:
                found[identity] = {n: self._tensors[number] for n, number in numbers.items()}
            states[key] = found[identity]
        for number in delta.forget:
            self._tensors.pop(number, None)
        return states
