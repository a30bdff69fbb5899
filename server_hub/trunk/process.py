"""The trunk in a process of its own, so that a long step never blocks the hub's event loop.

Arrays go through shared memory; of the model's state only tensors that have changed. An evaluation
runs in slices while the process has nothing else to do. A process that dies, or is ended because a
step takes too long, is started again from the state that the round started from.
"""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing as mp
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_sdk.protocol.tensors import Array, State
from server_hub.trunk import startup
from server_hub.trunk.errors import TrunkFailed, TrunkRefused
from server_hub.trunk.interface import (
    EvaluationReport,
    Query,
    StepInput,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.shared_memory import StateSender
from server_hub.trunk.worker_process import LOADING_S, NAME, WorkerDied, WorkerProcess, result_of

log = logging.getLogger("cutlayer.hub")

_RESTARTS = 3
"""How often in a row the process is started again before a round is complete."""


class WorkerTrunk:
    """Implements :class:`server_hub.trunk.interface.Trunk` with a worker process.

    The trunk does one thing at a time, in the order of the calls, and evaluates in between.

    When the process dies, it is started again, with the state that the round started from; what was
    trained in the round is lost. What was under way is tried once more, each command alone. A batch
    that ends the process again is refused, and a query fails.

    Args:
        model: the model, or a function that builds it in the process.
        device: torch device of the process.
        held_out: examples to evaluate on, ``(x, y)``.
        arena_bytes: size of the shared memory of all lanes together, in bytes.
        threads: torch threads of the process; 0 for torch's default.
        step_s: seconds that a step or an answer may take.
    """

    steps_at_once = 2

    def __init__(
        self,
        model: startup.ModelSource,
        device: str,
        held_out: startup.HeldOut = None,
        arena_bytes: int = 256 * 2**20,
        threads: int = 0,
        step_s: float = 600.0,
    ) -> None:
        if mp.current_process().name == NAME:
            raise TrunkFailed("a hub was started by the import of its main script")
        self._model, self._held_out = model, held_out
        self._options = (device, arena_bytes, threads)
        self._step_s = step_s
        self._turn = asyncio.Lock()
        self._states = StateSender()
        self._worker: WorkerProcess | None = None
        self._served: tuple[Mapping[int, State], int] | None = None
        self._begun: tuple[State, TrunkPlan] | None = None
        self._steps = self._deaths = 0

    async def start(self) -> None:
        self._worker = await self._launch()

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        self._begun, self._steps = (state, plan), 0
        await self._call("begin", lambda: (self._states.delta({0: state}), plan), LOADING_S)

    async def features(self, step_input: StepInput) -> dict[str, Array] | None:
        parts: dict[str, Array] | None = await self._call_or_refuse("features", step_input)
        return parts

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        self._steps += 1
        try:
            report: StepReport = await self._call("step", lambda: (list(inputs),))
        except WorkerDied as death:
            # one of them is to blame; the others must not be refused for it
            refused = {i.device: str(death) for i in inputs} if len(inputs) == 1 else {}
            log.warning("%d batches are left out: %s", len(inputs), death)
            return StepReport(math.nan, 0, refused, (), [None] * len(inputs))
        return report

    async def finish(self) -> list[TrunkCopy]:
        passes = 1 if self._begun is None else self._begun[1].epochs
        steps = max((passes - 1) * self._steps, 1)
        copies: list[TrunkCopy] = await self._call("finish", limit_s=steps * self._step_s)
        self._begun, self._deaths = None, 0
        return copies

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        self._served = (states, bases)
        await self._call("serve", lambda: (self._states.delta(states), bases), LOADING_S)

    async def answer(self, query: Query) -> Array:
        logits: Array = await self._call_or_refuse("answer", query)
        if self._begun is None:  # no round is under way that would show that the process lives
            self._deaths = 0
        return logits

    def evaluate(
        self, tiers: Mapping[str, tuple[int, str]], paths: Sequence[str]
    ) -> asyncio.Future[EvaluationReport]:
        return asyncio.ensure_future(self._evaluate(dict(tiers), tuple(paths)))

    async def _evaluate(
        self, tiers: dict[str, tuple[int, str]], paths: tuple[str, ...]
    ) -> EvaluationReport:
        while True:  # the number of restarts is bounded
            _, used = await self._call_on("evaluate", lambda: (tiers, paths), None)
            try:
                return await used.next_report()
            except WorkerDied as death:
                async with self._turn:
                    await self._recover(used, death)

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.close()

    # --- commands -------------------------------------------------------------------------------

    async def _call(
        self,
        command: str,
        arguments: Callable[[], tuple[Any, ...]] = tuple,
        limit_s: float | None = None,
    ) -> Any:
        return (await self._call_on(command, arguments, limit_s or self._step_s))[0]

    async def _call_or_refuse(self, command: str, argument: StepInput | Query) -> Any:
        try:
            return await self._call(command, lambda: (argument,))
        except WorkerDied as death:
            raise TrunkRefused(str(death)) from death

    async def _call_on(
        self, command: str, arguments: Callable[[], tuple[Any, ...]], limit_s: float | None
    ) -> tuple[Any, WorkerProcess]:
        """Send a command; return its result, and the process that it comes from.

        ``arguments`` are made when it is the command's turn: what changes in a state is said in the
        order in which commands go out.

        Raises:
            WorkerDied: the command has ended two processes. Another one runs by now.
        """
        async with self._turn:
            used = self._current()
            answer = await used.send(command, arguments(), limit_s)
        try:
            return await result_of(answer), used
        except WorkerDied as death:
            first = death
        async with self._turn:  # nothing else is on its way in the new process
            await self._recover(used, first)
            used = self._current()
            try:
                return await result_of(await used.send(command, arguments(), limit_s)), used
            except WorkerDied as death:
                await self._recover(used, death)
                raise

    def _current(self) -> WorkerProcess:
        if self._worker is None:
            raise TrunkFailed("the trunk was not started")
        return self._worker

    # --- the process ----------------------------------------------------------------------------

    async def _launch(self) -> WorkerProcess:
        payload = await asyncio.to_thread(startup.dump, self._model, self._held_out)
        launched = WorkerProcess(*self._options)
        try:
            await launched.start(payload)
            self._states = StateSender()
            if self._served is not None:
                states, bases = self._served
                arguments = (self._states.delta(states), bases)
                await result_of(await launched.send("serve", arguments, LOADING_S))
            if self._begun is not None:
                state, plan = self._begun
                delta = self._states.delta({0: state})
                await result_of(await launched.send("begin", (delta, plan), LOADING_S))
        except BaseException:
            launched.kill()
            await launched.close()
            raise
        return launched

    async def _recover(self, dead: WorkerProcess, death: WorkerDied) -> None:
        """Start a new process in place of one that has died, unless that has happened already.

        Raises:
            TrunkFailed: it has died too often, or cannot be started.
        """
        if self._worker is not dead:
            return
        await dead.close()
        while True:
            self._deaths += 1
            if self._deaths > _RESTARTS:
                raise TrunkFailed(
                    f"{death}; that was {self._deaths} times without a complete round in between"
                ) from death
            log.warning("%s; it is started again from the start of the round", death)
            try:
                self._worker = await self._launch()
                return
            except WorkerDied as again:
                death = again
