"""One process of the trunk, as the hub sees it: its start, its commands, its end.

Commands take two lanes in turn, so that the next one lies ready in shared memory while the process
works on the one before. :mod:`server_hub.trunk.worker` is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from server_hub.trunk import startup, worker
from server_hub.trunk.errors import TrunkFailed, WorkerDied
from server_hub.trunk.interface import EvaluationReport
from server_hub.trunk.shared_memory import SharedMemoryPipe

NAME = "trunk"
"""Name of the process."""

_LANES = 2
"""Number of commands that may be on their way at once."""

LOADING_S = 600.0
"""Seconds that the process may take to start, or to load a state."""

_CLOSING_S = 3.0
"""Seconds that the process has to stop, before it is killed."""


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
                    name=NAME,
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
        await result_of(await self.send("start", arguments, LOADING_S))
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

    async def idle(self) -> None:
        """Wait until no command is on its way.

        Raises:
            WorkerDied: one of them has ended the process.
        """
        answers = [lane.answer for lane in self._lanes if lane.answer is not None]
        if answers:
            await asyncio.wait(answers)
        for answer in answers:
            if not answer.cancelled() and isinstance(death := answer.exception(), WorkerDied):
                raise death

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
