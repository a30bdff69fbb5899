"""The trunk in this process: for tests and simulations."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from edge_sdk.protocol.tensors import Array, State
from export.cutting.split_model import SplitModel
from server_hub.trunk.evaluator import Evaluator, finished
from server_hub.trunk.interface import (
    EvaluationReport,
    Query,
    StepInput,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.step import TrunkTrainer


class LocalTrunk:
    """Implements :class:`server_hub.trunk.interface.Trunk` in this process.

    Nothing runs beside anything else: every call blocks until its result is there.

    Args:
        model: the model; its own trained tensors are not used.
        device: torch device.
        held_out: examples to evaluate on, ``(x, y)``.
    """

    steps_at_once = 1

    def __init__(
        self,
        model: SplitModel,
        device: str = "cpu",
        held_out: tuple[Array, Array] | None = None,
    ) -> None:
        self.trainer = TrunkTrainer(model, device)
        self.evaluator = Evaluator(model, device, held_out)

    async def start(self) -> None:
        pass

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        self.trainer.begin(state, plan)

    async def features(self, step_input: StepInput) -> dict[str, Array] | None:
        return self.trainer.features(step_input)

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        return self.trainer.step(inputs)

    async def finish(self) -> list[TrunkCopy]:
        return self.trainer.finish()

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        self.evaluator.serve(states, bases)

    async def answer(self, query: Query) -> Array:
        return self.evaluator.answer(query)

    def evaluate(
        self, tiers: Mapping[str, tuple[int, str]], paths: Sequence[str]
    ) -> asyncio.Future[EvaluationReport]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(finished(self.evaluator.evaluate(tiers, paths)))
        return future

    async def close(self) -> None:
        pass
