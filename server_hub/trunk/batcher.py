"""The step batcher: batches of devices are merged into steps of the trunk."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from edge_sdk.protocol.messages import DIVERGED, Gradient
from server_hub.concurrency import Changes, Effect
from server_hub.trunk.interface import StepInput, StepReport, Trunk
from server_hub.trunk.settings import TrunkTraining
from server_hub.trunk.shuffle_buffer import ShuffleBuffer
from server_hub.trunk.step_size import StepBounds


@dataclass(frozen=True)
class PendingBatch:
    """A batch that waits for a step of the trunk.

    Attributes:
        round: number of the round.
        number: number of the batch among those of its device in the round.
        step_input: the batch.
        reply: sends the batch's gradient to the device, in rounds with returned gradients.
        refuse: called with the reason if the trunk cannot use the batch.
        give_up: called with the reason if the batch's gradient will never come, by no fault of the
            device.
        effect: complete once the batch is sure to be trained on.
    """

    round: int
    number: int
    step_input: StepInput
    reply: Callable[[Gradient], None]
    refuse: Callable[[str], None]
    give_up: Callable[[str], None]
    effect: Effect = field(default_factory=Effect)

    @property
    def device(self) -> str:
        """Name of the device that has sent the batch."""
        return self.step_input.device

    @property
    def rows(self) -> int:
        """Number of examples in the batch."""
        return self.step_input.rows

    @property
    def length(self) -> int:
        """Number of positions of each example, of a text; else 1."""
        return self.step_input.length

    @property
    def nbytes(self) -> int:
        """Size of the packed activations, in bytes."""
        return self.step_input.nbytes


@dataclass
class RoundTotals:
    """What the steps of a round have come to.

    Attributes:
        steps: number of steps.
        seconds: seconds in which a step was under way.
        loss: sum of the loss over rows whose labels are on the hub.
        rows: number of these rows.
        device_losses: by device, the sum of the loss over its labels, and their number.
    """

    steps: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    rows: int = 0
    device_losses: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float | None:
        """Mean loss of a row; None if no row has come whose label is on the hub."""
        return self.loss / self.rows if self.rows else None


class StepBatcher:
    """Merges batches into steps, and makes the steps.

    Devices take turns: a step takes a batch of each device that waits before it takes a second one
    of any. A device may leave only a window of messages unsettled, so what waits is bounded, and a
    slow trunk slows the devices down.

    Args:
        trunk: makes the steps.
        settings: how many rows to merge and to shuffle, and how long to wait for them.
        merges: whether batches are merged; otherwise each batch is a step of its own.
    """

    def __init__(self, trunk: Trunk, settings: TrunkTraining, merges: bool) -> None:
        self._trunk, self._settings = trunk, settings
        rows = settings.max_rows if merges else 1
        self._bounds = StepBounds(rows, settings.max_tokens, settings.max_mb * 2**20)
        self._buffer = ShuffleBuffer[PendingBatch](lambda batch: batch.effect.complete())
        self._changes = Changes()
        self._last = True
        self._turn = asyncio.Lock()
        self._under_way = 0
        self._busy_since = 0.0
        self.totals = RoundTotals()
        """What the steps of the present round have come to."""

    def __len__(self) -> int:
        return len(self._buffer)

    def begin(self, number: int, shuffles: bool) -> None:
        """Begin a round.

        Args:
            number: the round's number, which seeds the shuffle buffer.
            shuffles: whether batches go through the shuffle buffer. In rounds with returned
                gradients they do not, since devices wait for the gradients.
        """
        self._buffer.begin(self._settings.mix_rows if shuffles else 0, number)
        self._last = False
        self.totals = RoundTotals()

    def put(self, batch: PendingBatch) -> Effect:
        """Take a batch; returns the effect of the message that has brought it."""
        self._buffer.put(batch)
        self._changes.wake()
        return batch.effect

    async def drain(self) -> None:
        """The round is over: wait until every batch is used."""
        self._last = True
        self._changes.wake()
        await self._changes.until(lambda: not len(self._buffer) and not self._under_way)

    async def run(self) -> None:
        """Make steps, for ever: as many at once as the trunk can take."""
        makers = [asyncio.create_task(self._make_steps()) for _ in range(self._trunk.steps_at_once)]
        try:
            await asyncio.gather(*makers)
        finally:
            for maker in makers:
                maker.cancel()
            await asyncio.gather(*makers, return_exceptions=True)

    async def _make_steps(self) -> None:
        while True:
            async with self._turn:
                group = await self._next_group()
                self._begin_step()
            report = await self._trunk.step([batch.step_input for batch in group])
            self._end_step()
            self._settle(group, report)
            self._changes.wake()

    async def _next_group(self) -> list[PendingBatch]:
        """Wait until there are rows for a full step, or no more will come in time; take them.

        While a step is under way, there is time for rows to come.
        """
        now = asyncio.get_running_loop().time
        await self._changes.until(lambda: self._buffer.ready(self._last))
        deadline = now() + self._settings.wait_s

        def enough() -> bool:
            overdue = not self._under_way and now() >= deadline
            return self._last or self._buffer.rows >= self._bounds.rows or overdue

        await self._changes.until(enough, deadline)
        return self._buffer.take(self._bounds)

    def _begin_step(self) -> None:
        if not self._under_way:
            self._busy_since = asyncio.get_running_loop().time()
        self._under_way += 1

    def _end_step(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self.totals.seconds += asyncio.get_running_loop().time() - self._busy_since

    def _settle(self, group: list[PendingBatch], report: StepReport) -> None:
        """Give devices what the step has come to; their messages are settled now."""
        self._count(group, report)
        for batch, parts, loss in zip_longest(group, report.gradients, report.losses):
            if parts is not None:
                mean = None if loss is None else loss[0] / loss[1]
                batch.reply(Gradient(batch.round, batch.number, dict(parts), mean))
            batch.effect.complete()
        for device, reason in report.refused.items():
            next(b for b in group if b.device == device).refuse(reason)
        for device in report.diverged if report.gradients else ():
            next(b for b in group if b.device == device).give_up(
                f"{DIVERGED} on the trunk, which gives no gradients"
            )

    def _count(self, group: list[PendingBatch], report: StepReport) -> None:
        totals = self.totals
        totals.steps += bool(report.rows)
        if math.isfinite(report.loss):
            totals.loss += report.loss * report.rows
            totals.rows += report.rows
        for batch, loss in zip_longest(group, report.losses):
            if loss is not None:
                total, labels = totals.device_losses.get(batch.device, (0.0, 0))
                totals.device_losses[batch.device] = total + loss[0], labels + loss[1]
