"""The trunk of a simulated hub: in this process, and as fast as the hub is said to be."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.protocol.tensors import Array
from export.split import SplitModel
from server_hub.simulation.devices import Meter
from server_hub.trunk.interface import Arrival, State, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.local import LocalTrunk
from server_hub.trunk.step import TrunkCore

_TRAINING = 3
"""Operations of a training step against those of the forward pass: the backward pass has two
products for each of the forward pass."""


class TimedTrunk(LocalTrunk):
    """Implements :class:`server_hub.trunk.Trunk` on a virtual clock.

    Args:
        core: the trunk.
        flop: operations of the forward pass above each cut, per row; of texts per position.
        gflops: what the hub computes, in 10^9 operations per second; None for no limit.
        meter: counts.
    """

    def __init__(
        self, core: TrunkCore, flop: dict[int, float], gflops: float | None, meter: Meter
    ) -> None:
        super().__init__(core)
        self._flop, self._meter = flop, meter
        self._rate = math.inf if gflops is None else gflops * 1e9
        self._epochs, self._round_flop = 1, 0.0

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        self._epochs, self._round_flop = plan.epochs, 0.0
        await super().begin(state, plan)

    async def features(self, arrival: Arrival) -> dict[str, Array] | None:
        started = time.perf_counter()
        parts = await super().features(arrival)
        self._meter.seconds += time.perf_counter() - started
        await self._take(self._flop[arrival.cut] * arrival.positions)
        return parts

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        started = time.perf_counter()
        report = await super().step(arrivals)
        self._meter.seconds += time.perf_counter() - started
        flop = sum(_TRAINING * self._flop[a.cut] * a.positions for a in arrivals)
        self._round_flop += flop
        await self._take(flop)
        return report

    async def finish(self) -> list[TrunkCopy]:
        started = time.perf_counter()
        copies = await super().finish()
        self._meter.seconds += time.perf_counter() - started
        await self._take(self._round_flop * (self._epochs - 1))
        return copies

    async def _take(self, flop: float) -> None:
        """The time that so many operations take."""
        self._meter.trunk_flop += flop
        await asyncio.sleep(flop / self._rate)


@torch.no_grad()
def flop_above(
    model: SplitModel, cuts: Iterable[int], example: torch.Tensor, *, auxiliary: bool = True
) -> dict[int, float]:
    """Operations of the forward pass above each cut; ``auxiliary`` heads have a part in it, or not.

    Per row of ``example``; of texts per position, so that a shorter one takes less in proportion.
    """
    units = example.numel() if model.task == "tokens" else len(example)
    counts = {}
    model = copy.deepcopy(model).eval()  # the trunk goes on to train the one that was given
    for cut in set(cuts):
        h = model.segment(example, cut)
        with FlopCounterMode(display=False) as counter:
            for depth in range(cut, model.depth):
                h = model.block[depth](h)
                if auxiliary and str(depth + 1) in model.aux:
                    model.answer(depth + 1, h)
            model.head(h)
        counts[cut] = counter.get_total_flops() / units
    return counts
