"""The trunk in this process: for tests and simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_sdk.protocol.tensors import Array
from server_hub.trunk.interface import (
    Arrival,
    MixtureEvaluation,
    State,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.step import TrunkCore


class LocalTrunk:
    """Implements :class:`Trunk` in this process: for tests and simulation."""

    def __init__(self, core: TrunkCore) -> None:
        self.core = core

    async def start(self) -> None:
        pass

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        self.core.begin(state, plan)

    async def features(self, arrival: Arrival) -> dict[str, Array] | None:
        return self.core.features(arrival)

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        return self.core.step(arrivals)

    async def finish(self) -> list[TrunkCopy]:
        return self.core.finish()

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        self.core.serve(states, bases)

    async def answer(self, arrival: Arrival) -> Array:
        return self.core.answer(arrival)

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        return self.core.evaluate(tiers)

    async def evaluate_bases(self) -> MixtureEvaluation:
        return self.core.evaluate_bases()

    async def close(self) -> None:
        pass
