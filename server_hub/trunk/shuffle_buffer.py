"""What waits for a step of the trunk: a queue, and behind it a shuffle buffer.

Devices send their batches one after the other, and each device has its own mix of classes. A trunk
that steps on batches in the order of their arrival sees long runs of the same few classes. From a
shuffle buffer every step draws at random, as is done with files of sorted examples.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from server_hub.trunk.step_size import HasSize, StepBounds, StepSize, bucket

T = TypeVar("T", bound=HasSize)


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

    def take(self, bounds: StepBounds) -> list[T]:
        """Batches for one step, all of one bucket of lengths: within bounds, but at least one."""
        group: list[T] = []
        size = StepSize()
        while (chosen := self._choose(group)) is not None:
            waiting, place = chosen
            batch = waiting[place]
            larger = size.plus(batch)
            if group and not bounds.allow(larger):
                break
            self._remove(waiting, place)
            group.append(batch)
            size = larger
        self._admit()
        return group

    def _choose(self, group: list[T]) -> tuple[list[T] | deque[T], int] | None:
        """A random batch of the buffer, or else the first of the queue, that may join a group."""
        fitting = [i for i, batch in enumerate(self._buffer) if _may_join(batch, group)]
        if fitting:
            return self._buffer, fitting[self._rng.randrange(len(fitting))]
        places = (i for i, batch in enumerate(self._queue) if _may_join(batch, group))
        first = next(places, None)
        return None if first is None else (self._queue, first)

    def _remove(self, waiting: list[T] | deque[T], place: int) -> None:
        if waiting is self._buffer:
            self._rows -= self._buffer[place].rows
            self._buffer[place] = self._buffer[-1]
            place = len(self._buffer) - 1
        del waiting[place]

    def _admit(self) -> None:
        """Move batches from the queue to the buffer while it has room."""
        while self._queue and self._rows < self._capacity:
            batch = self._queue.popleft()
            self._buffer.append(batch)
            self._rows += batch.rows
            self._accepted(batch)


def _may_join(batch: HasSize, group: Sequence[HasSize]) -> bool:
    return not group or bucket(batch.length) == bucket(group[0].length)
