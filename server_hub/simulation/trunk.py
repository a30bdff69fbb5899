"""The trunk of a simulated hub: runs in this process and takes the virtual time of the hub."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.protocol.tensors import Array, State
from export.cutting.split_model import SplitModel
from server_hub.simulation.devices import Meter
from server_hub.trunk.interface import StepInput, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.local import LocalTrunk

_TRAINING = 3
"""Operations of a training step as a multiple of those of the forward pass: the backward pass has
two matrix products for each one of the forward pass."""


class TimedTrunk(LocalTrunk):
    """Implements :class:`server_hub.trunk.interface.Trunk` on a virtual clock.

    Args:
        model: the model; its own trained tensors are not used.
        held_out: examples that base networks are evaluated on, ``(x, y)``.
        flop: operations of the forward pass above each cut, per row; for texts, per position.
        gflops: compute of the hub, in 10^9 operations per second; None for no limit.
        meter: counts operations and real seconds.
    """

    def __init__(
        self,
        model: SplitModel,
        held_out: tuple[Array, Array] | None,
        flop: dict[int, float],
        gflops: float | None,
        meter: Meter,
    ) -> None:
        super().__init__(model, "cpu", held_out)
        self._flop, self._meter = flop, meter
        self._rate = math.inf if gflops is None else gflops * 1e9
        self._epochs, self._round_flop = 1, 0.0

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        self._epochs, self._round_flop = plan.epochs, 0.0
        await super().begin(state, plan)

    async def features(self, step_input: StepInput) -> dict[str, Array] | None:
        started = time.perf_counter()
        parts = await super().features(step_input)
        self._meter.seconds += time.perf_counter() - started
        await self._spend(self._flop[step_input.cut] * step_input.positions)
        return parts

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        started = time.perf_counter()
        report = await super().step(inputs)
        self._meter.seconds += time.perf_counter() - started
        flop = sum(_TRAINING * self._flop[i.cut] * i.positions for i in inputs)
        self._round_flop += flop
        await self._spend(flop)
        return report

    async def finish(self) -> list[TrunkCopy]:
        started = time.perf_counter()
        copies = await super().finish()
        self._meter.seconds += time.perf_counter() - started
        await self._spend(self._round_flop * (self._epochs - 1))
        return copies

    async def _spend(self, flop: float) -> None:
        """Wait for the virtual time of ``flop`` operations, and count them."""
        self._meter.trunk_flop += flop
        await asyncio.sleep(flop / self._rate)


@torch.no_grad()
def flop_above(
    model: SplitModel, cuts: Iterable[int], example: torch.Tensor, *, auxiliary: bool = True
) -> dict[int, float]:
    """Count the operations of the forward pass above each cut, per row; for texts, per position.

    Args:
        model: the model; it is not changed.
        cuts: cut layers.
        example: some inputs, (rows, …).
        auxiliary: whether to count the auxiliary heads above the cut.

    Returns:
        Operations by cut layer.
    """
    units = example.numel() if model.task == "tokens" else len(example)
    counts = {}
    model = copy.deepcopy(model).eval()  # the trunk trains the original
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
