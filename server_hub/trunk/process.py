"""The trunk in a process of its own, so that a long step never blocks the hub's event loop.

Arrays go through shared memory; of the model's state only tensors that have changed. Commands take
two lanes in turn, so that the next one lies ready in shared memory while the process works on the
one before. An evaluation runs in slices while the process has nothing else to do.

A process that dies, or is ended because a step takes too long, is started again from the state that
the round started from. :mod:`server_hub.trunk.worker` is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing as mp
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from edge_sdk.protocol.tensors import Array, State
from server_hub.trunk import startup, worker
from server_hub.trunk.errors import TrunkFailed, TrunkRefused
from server_hub.trunk.interface import (
    EvaluationReport,
    Query,
    StepInput,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.shared_memory import SharedMemoryPipe, StateSender

log = logging.getLogger("cutlayer.hub")

_NAME = "trunk"
"""Name of the process."""

_LANES = 2
"""Number of commands that may be on their way at once."""

_RESTARTS = 3
"""How often in a row the process is started again before a round is complete."""

_LOADING_S = 600.0
"""Seconds that the process may take to start, or to load a state."""

_CLOSING_S = 3.0
"""Seconds that the process has to stop, before it is killed."""


class WorkerDied(TrunkFailed):
    """The trunk's process has ended in the middle of a command."""


@dataclass
class _Lane:
    """A way for commands: a pipe, and the answer that is awaited on it, if any."""

    pipe: SharedMemoryPipe
    answer: asyncio.Future[worker.Answer] | None = None


class WorkerProcess:
    """One process of the trunk, from its start to its end.

    Args:
        device: torch device of the process.
        arena_bytes: size of the shared memory of all lanes together, in bytes.
        threads: torch threads of the process; 0 for torch's default.

    Raises:
        ConfigError: there is no room for the shared memory.
    """

    def __init__(self, device: str, arena_bytes: int, threads: int) -> None:
        self._calls = ThreadPoolExecutor(_LANES, "trunk")
        self._evaluations = ThreadPoolExecutor(1, "trunk-evaluation")
        self._lanes: deque[_Lane] = deque()
        self._ending = threading.Lock()
        self._why_killed: str | None = None
        self._closed = self._started = False
        self._process: SpawnProcess | None = None
        context = mp.get_context("spawn")
        main = startup.main_script()
        self._reports, reports = context.Pipe(duplex=False)
        theirs: list[tuple[Connection, str]] = []
        try:
            with _own_interpreter():
                for _ in range(_LANES):
                    ours, other = context.Pipe()
                    self._lanes.append(_Lane(SharedMemoryPipe(ours, arena_bytes // _LANES)))
                    theirs.append((other, self._lanes[-1].pipe.name))
                process = context.Process(
                    target=worker.work,
                    args=(theirs, reports, device, threads, main),
                    name=_NAME,
                    daemon=True,
                )
                process.start()
                self._process = process
        except BaseException:
            self._release()
            raise
        finally:
            for connection in (reports, *(connection for connection, _ in theirs)):
                connection.close()

    async def start(self, payload: bytes) -> None:
        """Load the model.

        Args:
            payload: what :func:`server_hub.trunk.startup.dump` returned.

        Raises:
            TrunkFailed, ConfigError: the process cannot start.
        """
        arguments = (np.frombuffer(payload, np.uint8),)
        await result_of(await self.send("start", arguments, _LOADING_S))
        self._started = True

    async def send(
        self, command: str, arguments: tuple[Any, ...], limit_s: float | None
    ) -> asyncio.Future[worker.Answer]:
        """Send a command, once the lane that it takes is free; return its answer to come.

        Args:
            command: name of a method of the worker.
            arguments: its arguments.
            limit_s: seconds from the answer before to this answer, after which the process is
                killed; None for no limit.

        Raises:
            WorkerDied: the process has been closed.
        """
        lane = self._lanes[0]
        if lane.answer is not None:
            await asyncio.wait([lane.answer])
        if self._closed:
            raise WorkerDied(f"the trunk's process was closed before {command}")
        self._lanes.rotate(-1)
        loop = asyncio.get_running_loop()
        answer = loop.run_in_executor(self._calls, self._exchange, lane.pipe, command, arguments)
        lane.answer = answer
        # a caller that has been cancelled does not look at its failure
        answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())

        def begin(_: object = None) -> None:
            assert limit_s is not None
            why = f"made no answer in {command} within {limit_s:g} s"
            late = loop.call_later(limit_s, self.kill, why)
            answer.add_done_callback(lambda _: late.cancel())

        before = self._lanes[0].answer
        if limit_s is None:
            pass
        elif before is None or before.done():
            begin()
        else:
            before.add_done_callback(begin)
        return answer

    async def next_report(self) -> EvaluationReport:
        """The report of the evaluation that was started last.

        Raises:
            TrunkFailed: the evaluation has failed.
            WorkerDied: the process has ended.
        """
        loop = asyncio.get_running_loop()
        report = await result_of(loop.run_in_executor(self._evaluations, self._receive_report))
        assert isinstance(report, EvaluationReport)
        return report

    def kill(self, why: str | None = None) -> None:
        """End the process at once.

        Args:
            why: what an error says of it.
        """
        self._why_killed = self._why_killed or why
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        """End the process, and release everything."""
        if self._closed:
            return
        try:
            if self._started:
                with contextlib.suppress(TrunkFailed, TimeoutError):
                    async with asyncio.timeout(_CLOSING_S):
                        await asyncio.shield(await self.send("stop", (), None))
                    await asyncio.to_thread(self._join, _CLOSING_S)
        finally:
            self._closed = True
            self.kill()
            answers = [lane.answer for lane in self._lanes if lane.answer is not None]
            try:
                if answers:  # the threads that wait for them see the end of the process
                    await asyncio.wait(answers, timeout=_CLOSING_S)
            finally:
                self._release()

    def _release(self) -> None:
        if self._process is not None:
            self._join(_CLOSING_S)
        self._calls.shutdown(wait=False)
        self._evaluations.shutdown(wait=False)
        self._reports.close()
        for lane in self._lanes:
            lane.pipe.close()

    def _exchange(
        self, pipe: SharedMemoryPipe, command: str, arguments: tuple[Any, ...]
    ) -> worker.Answer:
        try:
            pipe.send((command, arguments))
            answer: worker.Answer = pipe.receive(copy=True)
            return answer
        except (EOFError, OSError) as error:
            raise self._ended(command) from error
        except BaseException:
            self.kill()  # the worker would wait for this command for ever
            raise

    def _receive_report(self) -> worker.Answer:
        try:
            answer: worker.Answer = self._reports.recv()
            return answer
        except (EOFError, OSError) as error:
            raise self._ended("evaluate") from error

    def _ended(self, command: str) -> WorkerDied:
        self._join(_CLOSING_S)
        code = None if self._process is None else self._process.exitcode
        why = self._why_killed or f"ended with exit code {code} in {command}"
        return WorkerDied(f"the trunk's process {why}")

    def _join(self, timeout_s: float) -> None:
        with self._ending:  # a process can be joined by one thread at a time
            if self._process is not None:
                self._process.join(timeout_s)


async def result_of(answer: asyncio.Future[worker.Answer]) -> Any:
    """The result of a command; a caller may be cancelled while the process works on."""
    failure, result = await asyncio.shield(answer)
    if failure is not None:
        raise failure
    return result


@contextlib.contextmanager
def _own_interpreter() -> Iterator[None]:
    """A context in which a new interpreter imports nothing of the user's on its own.

    It would import the main script, so that a script without a main guard would start a hub in the
    process. And it would look for the standard library in the working folder first.
    """
    main, safe = sys.modules["__main__"], os.environ.get("PYTHONSAFEPATH")
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if safe is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = safe


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
        if mp.current_process().name == _NAME:
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
        await self._call("begin", lambda: (self._states.delta({0: state}), plan), _LOADING_S)

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
        await self._call("serve", lambda: (self._states.delta(states), bases), _LOADING_S)

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
                await result_of(await launched.send("serve", arguments, _LOADING_S))
            if self._begun is not None:
                state, plan = self._begun
                delta = self._states.delta({0: state})
                await result_of(await launched.send("begin", (delta, plan), _LOADING_S))
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
