"""What waits for a step of the trunk: a queue, and behind it a shuffle buffer.

Devices send their batches one after the other, and each device has its own mix of classes. A trunk
that steps on batches in the order of their arrival sees long runs of the same few classes. From a
shuffle buffer every step draws at random, as is done with files of sorted examples.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class HasRows(Protocol):
    """A batch with a number of rows."""

    @property
    def rows(self) -> int:
        """Number of examples in the batch."""


T = TypeVar("T", bound=HasRows)


class ShuffleBuffer(Generic[T]):
    """Takes batches; gives groups of them for merged steps.

    Args:
        accepted: called with every batch that has entered the buffer: it is sure to be used.
    """

    def __init__(self, accepted: Callable[[T], None]) -> None:
        self._capacity, self._accepted = 0, accepted
        self._queue: deque[T] = deque()
        self._buffer: list[T] = []
        self._rows = 0
        self._rng = random.Random(0)

    def __len__(self) -> int:
        return len(self._queue) + len(self._buffer)

    @property
    def rows(self) -> int:
        """Number of rows that wait."""
        return self._rows + sum(batch.rows for batch in self._queue)

    def begin(self, capacity: int, seed: int) -> None:
        """Begin a round.

        Args:
            capacity: number of rows that the buffer is filled up to before a step draws from it;
                0 for steps on batches in the order of their arrival.
            seed: seed of the draws.
        """
        self._capacity, self._rng = capacity, random.Random(seed)

    def put(self, batch: T) -> None:
        """Take a batch."""
        self._queue.append(batch)
        self._admit()

    def ready(self, last: bool) -> bool:
        """Whether there is a group to step on; ``last`` says that no more batches will come."""
        return len(self) > 0 and (last or not self._capacity or self._rows >= self._capacity)

    def take(self, max_rows: int) -> list[T]:
        """Batches for one step: at most ``max_rows`` rows, but at least one batch."""
        group: list[T] = []
        rows = 0
        while len(self):
            chosen = self._rng.randrange(len(self._buffer)) if self._buffer else None
            batch = self._queue[0] if chosen is None else self._buffer[chosen]
            if group and rows + batch.rows > max_rows:
                break
            self._remove(chosen)
            group.append(batch)
            rows += batch.rows
        self._admit()
        return group

    def _remove(self, chosen: int | None) -> None:
        """Remove the chosen batch of the buffer, or the first of the queue."""
        if chosen is None:
            self._queue.popleft()
            return
        self._rows -= self._buffer[chosen].rows
        self._buffer[chosen] = self._buffer[-1]
        self._buffer.pop()

    def _admit(self) -> None:
        """Move batches from the queue to the buffer while it has room."""
        while self._queue and self._rows < self._capacity:
            batch = self._queue.popleft()
            self._buffer.append(batch)
            self._rows += batch.rows
            self._accepted(batch)
