"""What devices send to the trunk: mixed, merged into steps, settled, and gradients sent back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

from edge_sdk.protocol.messages import Gradient
from server_hub.concurrency import Changes
from server_hub.config import TrunkTraining
from server_hub.gateway.peers import Peer
from server_hub.trunk.interface import Arrival, Trunk
from server_hub.trunk.shuffle_buffer import ShuffleBuffer


@dataclass(frozen=True)
class PendingBatch:
    """An arrival that waits for the trunk, to be settled once it is sure to be trained on."""

    round: int
    batch: int
    arrival: Arrival
    peer: Peer
    seq: int

    @property
    def rows(self) -> int:
        """Examples in it."""
        return self.arrival.rows

    def settle(self) -> None:
        """Tell the device that it need not keep it."""
        self.peer.session.settle(self.seq)


class StepBatcher:
    """Feeds the trunk.

    A device has at most a window of batches that are neither used nor mixed, so what waits is
    bounded, and a trunk that is slow slows the devices down.

    Args:
        trunk: makes the steps.
        settings: how many rows to merge and to mix, and how long to wait for them.
        merges: whether arrivals are merged; else each is a step of its own.
        returned: sends a gradient to a device.
        refused: told of a device whose arrival the trunk refuses, with the reason.
    """

    def __init__(
        self,
        trunk: Trunk,
        settings: TrunkTraining,
        merges: bool,
        returned: Callable[[Peer, Gradient], None],
        refused: Callable[[Peer, str], None],
    ) -> None:
        self._trunk, self._settings = trunk, settings
        self._max_rows = settings.max_rows if merges else 1
        self._returned, self._refused = returned, refused
        self._mixer = ShuffleBuffer[PendingBatch](PendingBatch.settle)
        self._changes = Changes()
        self._last = True
        self._stepping = False
        self.steps = 0
        """Steps of the round."""
        self.seconds = 0.0
        """That they have taken."""
        self.losses: list[tuple[float, int]] = []
        """Loss and rows of every step, where labels are here."""
        self.device_losses: dict[str, tuple[float, int]] = {}
        """Of each device in the round: sum of the losses on its labels, and their number."""

    def __len__(self) -> int:
        return len(self._mixer)

    def begin(self, number: int, mixes: bool) -> None:
        """A round begins; ``mixes`` unless devices wait for the gradients of what they send."""
        self._mixer.begin(self._settings.mix_rows if mixes else 0, number)
        self._last = False
        self.steps, self.seconds = 0, 0.0
        self.losses, self.device_losses = [], {}

    def put(self, waiting: PendingBatch) -> None:
        """A batch has come."""
        self._mixer.put(waiting)
        self._changes.wake()

    async def drain(self) -> None:
        """The round is over: wait until all that has come is used."""
        self._last = True
        self._changes.wake()
        await self._changes.until(lambda: not len(self._mixer) and not self._stepping)

    async def run(self) -> None:
        """Step on what there is, for ever."""
        while True:
            await self._changes.until(lambda: self._mixer.ready(self._last))
            self._stepping = True
            if self._mixer.rows < self._max_rows and not self._last:
                await asyncio.sleep(self._settings.wait_s)
            await self._step(self._mixer.take(self._max_rows))
            self._stepping = False
            self._changes.wake()

    async def _step(self, group: list[PendingBatch]) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        report = await self._trunk.step([waiting.arrival for waiting in group])
        self.seconds += now() - began
        for waiting, parts, found in zip_longest(group, report.gradients, report.losses):
            if parts is not None:
                gradient = Gradient(
                    round=waiting.round,
                    batch=waiting.batch,
                    parts=dict(parts),
                    loss=None if found is None else found[0] / found[1],
                )
                self._returned(waiting.peer, gradient)
            waiting.settle()
            if found is not None:
                loss, labels = self.device_losses.get(waiting.arrival.device, (0.0, 0))
                self.device_losses[waiting.arrival.device] = loss + found[0], labels + found[1]
        if report.rows:
            self.steps += 1
        if math.isfinite(report.loss):
            self.losses.append((report.loss, report.rows))
        for device, reason in report.refused.items():
            peer = next(w.peer for w in group if w.peer.device == device)
            self._refused(peer, reason)
