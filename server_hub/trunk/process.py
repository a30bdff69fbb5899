"""The trunk in a process of its own, so that a long step never blocks the hub's event loop.

Arrays go through shared memory; of the model's state only tensors that have changed. Commands take
two lanes in turn, so that the next one lies ready in shared memory while the process works on the
one before. An evaluation runs in slices while the process has nothing else to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import multiprocessing as mp
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.tensors import Array, State
from export.split import SplitModel
from server_hub.trunk.evaluator import Evaluation, Evaluator
from server_hub.trunk.interface import (
    EvaluationReport,
    Query,
    StepInput,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.shared_memory import (
    SharedMemoryPipe,
    StateDelta,
    StateReceiver,
    StateSender,
)
from server_hub.trunk.step import TrunkTrainer

_Answer = tuple[str | None, Any]
"""Why a command has failed, or None; and its result."""

_LANES = 2
"""Number of commands that may be on their way at once."""


class TrunkFailed(CutlayerError):
    """The trunk's process has ended or raised; the job cannot go on."""


@dataclass
class _Lane:
    """A way for commands: a pipe, and the answer that is awaited on it, if any."""

    pipe: SharedMemoryPipe
    answer: asyncio.Future[_Answer] | None = None


class WorkerTrunk:
    """Implements :class:`server_hub.trunk.interface.Trunk` with a worker process.

    The trunk does one thing at a time, in the order of the calls, and evaluates in between.

    Args:
        model: the model; sent to the worker once.
        device: torch device of the worker.
        held_out: examples to evaluate on, ``(x, y)``.
        arena_bytes: size of the shared memory of all lanes together, in bytes.
        threads: torch threads of the worker; 0 for torch's default.
    """

    steps_at_once = 2

    def __init__(
        self,
        model: SplitModel,
        device: str,
        held_out: tuple[Array, Array] | None = None,
        arena_bytes: int = 256 * 2**20,
        threads: int = 0,
    ) -> None:
        self._arguments = (model, device, held_out, threads)
        self._arena_bytes = arena_bytes
        self._turn = asyncio.Lock()
        self._calls = ThreadPoolExecutor(_LANES, "trunk")
        self._evaluations = ThreadPoolExecutor(1, "trunk-evaluation")
        self._states = StateSender()
        self._lanes: deque[_Lane] = deque()
        self._ending = threading.Lock()
        self._reports: Connection | None = None
        self._process: Any = None

    async def start(self) -> None:
        context = mp.get_context("spawn")
        self._reports, reports = context.Pipe(duplex=False)
        theirs = []
        for _ in range(_LANES):
            ours, other = context.Pipe()
            self._lanes.append(_Lane(SharedMemoryPipe(ours, self._arena_bytes // _LANES)))
            theirs.append((other, self._lanes[-1].pipe.name))
        self._process = context.Process(
            target=_work, args=(theirs, reports, *self._arguments), name="trunk", daemon=True
        )
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._calls, self._process.start)
        for connection in (reports, *(connection for connection, _ in theirs)):
            connection.close()
        await self._call("hello")

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        await self._call("begin", lambda: (self._states.delta({0: state}), plan))

    async def features(self, step_input: StepInput) -> dict[str, Array] | None:
        parts: dict[str, Array] | None = await self._call("features", lambda: (step_input,))
        return parts

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        report: StepReport = await self._call("step", lambda: (list(inputs),))
        return report

    async def finish(self) -> list[TrunkCopy]:
        copies: list[TrunkCopy] = await self._call("finish")
        return copies

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        await self._call("serve", lambda: (self._states.delta(states), bases))

    async def answer(self, query: Query) -> Array:
        logits: Array = await self._call("answer", lambda: (query,))
        return logits

    def evaluate(
        self, tiers: Mapping[str, tuple[int, str]], paths: Sequence[str]
    ) -> asyncio.Future[EvaluationReport]:
        return asyncio.ensure_future(self._evaluate(dict(tiers), tuple(paths)))

    async def _evaluate(
        self, tiers: dict[str, tuple[int, str]], paths: tuple[str, ...]
    ) -> EvaluationReport:
        await self._call("evaluate", lambda: (tiers, paths))
        loop = asyncio.get_running_loop()
        failure, report = await loop.run_in_executor(self._evaluations, self._next_report)
        if failure is not None:
            raise TrunkFailed(f"the trunk failed in evaluate: {failure}")
        assert isinstance(report, EvaluationReport)
        return report

    async def close(self) -> None:
        if self._lanes:
            with contextlib.suppress(TrunkFailed, TimeoutError):
                async with asyncio.timeout(5):
                    await self._call("stop")
        if self._process is not None and self._process.pid is not None:
            await asyncio.to_thread(self._process.join, 5)
            if self._process.is_alive():
                self._process.kill()
                await asyncio.to_thread(self._process.join)
        self._calls.shutdown(wait=False)
        self._evaluations.shutdown(wait=False)
        for lane in self._lanes:
            lane.pipe.close()

    async def _call(self, command: str, arguments: Callable[[], tuple[Any, ...]] = tuple) -> Any:
        """Send a command; wait for its result in a thread.

        ``arguments`` are made when it is the command's turn: what changes in a state is said in the
        order in which commands go out.
        """
        async with self._turn:
            lane = self._lanes[0]
            if lane.answer is not None:
                await asyncio.wait([lane.answer])
            self._lanes.rotate(-1)
            lane.answer = asyncio.get_running_loop().run_in_executor(
                self._calls, self._exchange, lane.pipe, command, arguments()
            )
            # a caller that has been cancelled does not look at its failure
            lane.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        failure, result = await asyncio.shield(lane.answer)
        if failure is not None:
            raise TrunkFailed(f"the trunk failed in {command}: {failure}")
        return result

    def _exchange(
        self, pipe: SharedMemoryPipe, command: str, arguments: tuple[Any, ...]
    ) -> _Answer:
        try:
            pipe.send((command, arguments))
            answer: _Answer = pipe.receive(copy=True)
            return answer
        except (EOFError, OSError) as error:
            raise self._ended(f"in {command}") from error
        except BaseException:
            self._process.kill()  # the worker would wait for this command for ever
            raise

    def _next_report(self) -> _Answer:
        """The result of the evaluation that was started last."""
        assert self._reports is not None
        try:
            answer: _Answer = self._reports.recv()
            return answer
        except (EOFError, OSError) as error:
            raise self._ended("in evaluate") from error

    def _ended(self, where: str) -> TrunkFailed:
        with self._ending:  # a process can be joined by one thread at a time
            self._process.join(5)
            code = self._process.exitcode
        return TrunkFailed(f"the trunk's process ended with exit code {code} {where}")


def _work(
    lanes: Sequence[tuple[Connection, str]],
    reports: Connection,
    model: SplitModel,
    device: str,
    held_out: tuple[Array, Array] | None,
    threads: int,
) -> None:
    """The worker's process: one command, one answer."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the hub, which then stops us
    if threads:
        torch.set_num_threads(threads)
    pipes = [SharedMemoryPipe(connection, name=name) for connection, name in lanes]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(EOFError, OSError))  # the hub has gone
        for pipe in pipes:
            stack.enter_context(pinned(pipe.block, device))
        _Worker(model, device, held_out, reports).run(pipes)
    for pipe in pipes:
        pipe.close()


@contextlib.contextmanager
def pinned(block: memoryview, device: str) -> Iterator[None]:
    """Pin memory, so that a GPU copies from it without the host waiting; nothing for a CPU.

    Args:
        block: the memory.
        device: torch device that copies from it.

    Raises:
        RuntimeError: the memory cannot be pinned.
    """
    import torch

    if torch.device(device).type != "cuda":
        yield
        return
    address = np.frombuffer(block, np.uint8).ctypes.data
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(address, block.nbytes, 0))
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.check_error(runtime.cudaHostUnregister(address))


class _Worker:
    """Commands of the hub, each a method that returns the answer."""

    def __init__(
        self,
        model: SplitModel,
        device: str,
        held_out: tuple[Array, Array] | None,
        reports: Connection,
    ) -> None:
        self._trainer = TrunkTrainer(model, device)
        self._evaluator = Evaluator(model, device, held_out)
        self._states = StateReceiver()
        self._reports = reports
        self._evaluation: Evaluation | None = None

    def run(self, pipes: Sequence[SharedMemoryPipe]) -> None:
        """Answer commands, which take the pipes in turn, until ``stop``.

        Make slices of an evaluation while no command is there.
        """
        for pipe in itertools.cycle(pipes):
            while self._evaluation is not None and not pipe.poll():
                self._evaluate_slice()
            command, arguments = pipe.receive(copy=False)
            if command == "stop":
                pipe.send((None, None))
                return
            try:
                answer: _Answer = (None, getattr(self, command)(*arguments))
            except Exception as error:
                answer = (f"{type(error).__name__}: {error}", None)
            pipe.send(answer)

    def hello(self) -> None:
        pass

    def begin(self, delta: StateDelta, plan: TrunkPlan) -> None:
        self._trainer.begin(self._states.states(delta)[0], plan)

    def features(self, step_input: StepInput) -> dict[str, Array] | None:
        return self._trainer.features(step_input)

    def step(self, inputs: list[StepInput]) -> StepReport:
        if self._trainer.keeps_memory:
            inputs = copy.deepcopy(inputs)  # the shared memory will hold other batches
        return self._trainer.step(inputs)

    def finish(self) -> list[TrunkCopy]:
        return self._trainer.finish()

    def serve(self, delta: StateDelta, bases: int) -> None:
        self._evaluator.serve(self._states.states(delta), bases)

    def answer(self, query: Query) -> Array:
        return self._evaluator.answer(query)

    def evaluate(self, tiers: dict[str, tuple[int, str]], paths: tuple[str, ...]) -> None:
        while self._evaluation is not None:  # the one before has to end first
            self._evaluate_slice()
        self._evaluation = self._evaluator.evaluate(tiers, paths)

    def _evaluate_slice(self) -> None:
        assert self._evaluation is not None
        try:
            next(self._evaluation)
            return
        except StopIteration as end:
            answer: _Answer = (None, end.value)
        except Exception as error:
            answer = (f"{type(error).__name__}: {error}", None)
        self._evaluation = None
        self._reports.send(answer)
