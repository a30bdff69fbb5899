"""What waits for a step of the trunk: a queue, and behind it a shuffle buffer.

Devices send their batches one after the other, and each device has its own mix of classes. A trunk
that steps on batches in the order of their arrival sees long runs of the same few classes. From a
shuffle buffer every step draws at random, as is done with files of sorted examples.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from server_hub.trunk.step_size import HasSize, StepBounds, StepSize, bucket


class Waiting(HasSize, Protocol):
    """A batch that waits."""

    @property
    def device(self) -> str:
        """Name of the device that has sent the batch."""


T = TypeVar("T", bound=Waiting)


class ShuffleBuffer(Generic[T]):
    """Takes batches; gives groups of them for merged steps.

    Batches leave the queue by turns of their devices: a device with many batches makes another
    one's batch wait for a single one of its own.

    Args:
        accepted: called with every batch that has entered the buffer: it is sure to be used.
    """

    def __init__(self, accepted: Callable[[T], None]) -> None:
        self._capacity, self._accepted = 0, accepted
        self._queues: dict[str, deque[T]] = {}  # by device; the next device first
        self._queued = self._queued_rows = 0
        self._buffer: list[T] = []
        self._rows = 0
        self._rng = random.Random(0)

    def __len__(self) -> int:
        return self._queued + len(self._buffer)

    @property
    def rows(self) -> int:
        """Number of rows that wait."""
        return self._rows + self._queued_rows

    def begin(self, capacity: int, seed: int) -> None:
        """Begin a round.

        Args:
            capacity: number of rows that the buffer is filled up to before a step draws from it;
                0 for steps on batches from the queue.
            seed: seed of the draws.
        """
        self._capacity, self._rng = capacity, random.Random(seed)

    def put(self, batch: T) -> None:
        """Take a batch."""
        self._queues.setdefault(batch.device, deque()).append(batch)
        self._queued += 1
        self._queued_rows += batch.rows
        self._admit()

    def ready(self, last: bool) -> bool:
        """Whether there is a group to step on; ``last`` says that no more batches will come."""
        return len(self) > 0 and (last or not self._capacity or self._rows >= self._capacity)

    def take(self, bounds: StepBounds) -> list[T]:
        """Batches for one step, all of one bucket of lengths: within bounds, but at least one.

        They are random batches of the buffer. If it has none left that may join, one batch of each
        device in the queue follows, then a second one of each, and so on.
        """
        group: list[T] = []
        size = StepSize()
        for waiting, place in self._choices(group):
            batch = waiting[place]
            larger = size.plus(batch)
            if group and not bounds.allow(larger):
                break
            self._remove(waiting, place)
            group.append(batch)
            size = larger
        self._admit()
        return group

    def _choices(self, group: Sequence[T]) -> Iterator[tuple[list[T] | deque[T], int]]:
        """Where the next batch of a group is; the group grows with every choice."""
        while fitting := [i for i, batch in enumerate(self._buffer) if _may_join(batch, group)]:
            yield self._buffer, fitting[self._rng.randrange(len(fitting))]
        turns = deque(self._queues)
        while turns:
            device = turns.popleft()
            queue = self._queues[device]
            places = (i for i, batch in enumerate(queue) if _may_join(batch, group))
            if (first := next(places, None)) is not None:
                yield queue, first
                if queue:
                    turns.append(device)

    def _remove(self, waiting: list[T] | deque[T], place: int) -> None:
        batch = waiting[place]
        if waiting is self._buffer:
            self._rows -= batch.rows
            self._buffer[place] = self._buffer[-1]
            place = len(self._buffer) - 1
        else:
            self._queued -= 1
            self._queued_rows -= batch.rows
            if place == 0:  # else it keeps its turn: its oldest batch was passed over
                queue = self._queues.pop(batch.device)
                if len(queue) > 1:
                    self._queues[batch.device] = queue  # now it stands last
        del waiting[place]

    def _admit(self) -> None:
        """Move batches from the queue to the buffer while it has room."""
        while self._queues and self._rows < self._capacity:
            queue = next(iter(self._queues.values()))
            batch = queue[0]
            self._remove(queue, 0)
            self._buffer.append(batch)
            self._rows += batch.rows
            self._accepted(batch)


def _may_join(batch: HasSize, group: Sequence[HasSize]) -> bool:
    return not group or bucket(batch.length) == bucket(group[0].length)
