"""The trunk in a process of its own, so that a long step never blocks the hub's event loop.

Arrays go through shared memory; of the model's state only tensors that have changed. An evaluation
runs in slices while the process has nothing else to do. A process that dies, or is ended because a
step takes too long, is started again from the state that the round started from.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing as mp
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from edge_sdk.protocol.tensors import Array, State
from server_hub.trunk import startup
from server_hub.trunk.culprits import joined, without_culprits
from server_hub.trunk.errors import TrunkFailed, TrunkRefused, WorkerDied
from server_hub.trunk.interface import (
    EvaluationReport,
    Query,
    StepInput,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.shared_memory import StateSender
from server_hub.trunk.worker_process import LOADING_S, NAME, WorkerProcess, result_of

log = logging.getLogger("cutlayer.hub")

_RESTARTS = 3
"""How often the process is started again before a round is complete, if no device is to blame."""

_BLAMED = 32
"""How often the process is started again before a round is complete, because of devices.

To find one batch among 256 takes ten restarts, and to find that all of sixteen are to blame takes
32. A device that was found causes no more of them.
"""

_Blame = Callable[[WorkerDied], Awaitable[Any]]
"""Returns something in place of a command's result, given how the command has ended a process."""


class WorkerTrunk:
    """Implements :class:`server_hub.trunk.interface.Trunk` with a worker process.

    The trunk does one thing at a time, in the order of the calls, and evaluates in between.

    When the process dies, it is started again, with the state that the round started from; what was
    trained in the round is lost. What was under way is tried once more, each command alone. A step
    that ends the process again is halved until the batch to blame is found; a query is refused. The
    device that is to blame is refused from then on, without another try.

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
        self._culprits: dict[str, str] = {}
        self._steps = self._deaths = self._blamed = 0

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
        places = [n for n, i in enumerate(inputs) if i.device not in self._culprits]
        if len(places) == len(inputs):
            return await self._step(inputs)
        refused = {i.device: self._culprits[i.device] for i in inputs if i.device in self._culprits}
        parts = [(places, await self._step([inputs[n] for n in places]))] if places else []
        return joined(len(inputs), parts, refused)

    async def _step(self, inputs: Sequence[StepInput]) -> StepReport:
        async def step_alone(some: Sequence[StepInput]) -> StepReport:
            report: StepReport
            report, _ = await self._alone("step", lambda: (list(some),), self._step_s, blames=True)
            return report

        async def search(death: WorkerDied) -> StepReport:
            report, culprits = await without_culprits(step_alone, inputs, death)
            self._accuse(culprits)
            return report

        report: StepReport
        report, _ = await self._call_on("step", lambda: (list(inputs),), self._step_s, search)
        return report

    async def finish(self) -> list[TrunkCopy]:
        passes = 1 if self._begun is None else self._begun[1].epochs
        steps = max((passes - 1) * self._steps, 1)
        copies: list[TrunkCopy] = await self._call("finish", limit_s=steps * self._step_s)
        self._begun, self._deaths, self._blamed = None, 0, 0
        return copies

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        self._served = (states, bases)
        await self._call("serve", lambda: (self._states.delta(states), bases), LOADING_S)

    async def answer(self, query: Query) -> Array:
        logits: Array = await self._call_or_refuse("answer", query)
        if self._begun is None:  # no round is under way that would show that the process lives
            self._deaths = self._blamed = 0
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
        device = argument.device
        if device in self._culprits:
            raise TrunkRefused(self._culprits[device])

        async def refuse(death: WorkerDied) -> None:
            self._accuse({device: str(death)})
            raise TrunkRefused(str(death)) from death

        return (await self._call_on(command, lambda: (argument,), self._step_s, refuse))[0]

    def _accuse(self, culprits: Mapping[str, str]) -> None:
        """Refuse devices from now on, for the reasons given."""
        for device, reason in culprits.items():
            log.warning("%s is to blame, and refused from now on: %s", device, reason)
        self._culprits |= culprits

    async def _call_on(
        self,
        command: str,
        arguments: Callable[[], tuple[Any, ...]],
        limit_s: float | None,
        blame: _Blame | None = None,
    ) -> tuple[Any, WorkerProcess]:
        """Send a command; return its result, and the process that it comes from.

        Args:
            command: name of a method of the worker.
            arguments: makes its arguments when it is the command's turn: what changes in a state is
                said in the order in which commands go out.
            limit_s: seconds that it may take; None for no limit.
            blame: called if the command has ended two processes and a device is to blame for that;
                None if no device is.

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
        async with self._turn:
            await self._recover(used, first)
            try:
                return await self._alone(command, arguments, limit_s, blames=blame is not None)
            except WorkerDied as death:
                if blame is None:
                    raise
                self._deaths, self._blamed = max(self._deaths - 1, 0), self._blamed + 1
                return await blame(death), self._current()

    async def _alone(
        self,
        command: str,
        arguments: Callable[[], tuple[Any, ...]],
        limit_s: float | None,
        *,
        blames: bool,
    ) -> tuple[Any, WorkerProcess]:
        """Like :meth:`_call_on`, for a single try with nothing else on its way in the process."""
        while True:
            used = self._current()
            try:
                await used.idle()
                break
            except WorkerDied as death:
                await self._recover(used, death)
        try:
            return await result_of(await used.send(command, arguments(), limit_s)), used
        except WorkerDied as death:
            await self._recover(used, death, blames=blames)
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

    async def _recover(
        self, dead: WorkerProcess, death: WorkerDied, *, blames: bool = False
    ) -> None:
        """Start a new process in place of one that has died, unless that has happened already.

        Args:
            dead: the process.
            death: how it has ended.
            blames: whether a device is to blame.

        Raises:
            TrunkFailed: it has died too often, or cannot be started.
        """
        if self._worker is not dead:
            return
        await dead.close()
        while True:
            self._deaths, self._blamed = self._deaths + (not blames), self._blamed + blames
            often = self._blamed > _BLAMED
            if often or self._deaths > _RESTARTS:
                times = self._blamed if often else self._deaths
                whose = " because of batches of devices" if often else ""
                raise TrunkFailed(
                    f"{death}; that was {times} times{whose} without a complete round in between"
                ) from death
            log.warning("%s; it is started again from the start of the round", death)
            try:
                self._worker = await self._launch()
                return
            except WorkerDied as again:
                death, blames = again, False
