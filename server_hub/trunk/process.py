"""The trunk in a process of its own, so that a long step never blocks the hub's event loop.

Commands and weights go over a pipe; the payloads of activations lie in shared memory, which the
worker maps: they are copied once into it, and from there to the trunk's device.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing as mp
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.tensors import Array
from export.split import SplitModel
from server_hub.trunk.interface import (
    Arrival,
    MixtureEvaluation,
    State,
    StepReport,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.shared_memory import Arena
from server_hub.trunk.step import TrunkCore


class TrunkFailed(CutlayerError):
    """The trunk's process ended or raised; the job cannot go on."""


class WorkerTrunk:
    """Implements :class:`server_hub.trunk.Trunk` with a worker process.

    Calls take turns: the trunk does one thing at a time.

    Args:
        model: the model; sent to the worker once.
        device: torch device of the worker.
        held_out: examples to evaluate on.
        arena_bytes: shared memory for the payloads of one step.
        threads: torch threads of the worker, 0 for torch's default.
    """

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
        self._thread = ThreadPoolExecutor(1, "trunk")
        self._arena: Arena | None = None
        self._process: Any = None
        self._pipe: Connection | None = None

    async def start(self) -> None:
        context = mp.get_context("spawn")
        self._arena = Arena(self._arena_bytes)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, self._arena.name, *self._arguments), name="trunk"
        )
        await asyncio.get_running_loop().run_in_executor(self._thread, self._process.start)
        theirs.close()
        await self._call("hello")

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        await self._call("begin", state, plan)

    async def features(self, arrival: Arrival) -> dict[str, Array] | None:
        parts: dict[str, Array] | None = await self._call_with_arrivals("features", [arrival])
        return parts

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        report: StepReport = await self._call_with_arrivals("step", arrivals)
        return report

    async def finish(self) -> list[TrunkCopy]:
        copies: list[TrunkCopy] = await self._call("finish")
        return copies

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        await self._call("serve", dict(states), bases)

    async def answer(self, arrival: Arrival) -> Array:
        logits: Array = await self._call_with_arrivals("answer", [arrival])
        return logits

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        accuracy: dict[str, dict[str, float]] = await self._call("evaluate", dict(tiers))
        return accuracy

    async def evaluate_bases(self) -> MixtureEvaluation:
        report: MixtureEvaluation = await self._call("evaluate_bases")
        return report

    async def close(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(TrunkFailed, TimeoutError):
                await asyncio.wait_for(self._call("stop"), 5)
        if self._process is not None and self._process.pid is not None:
            await asyncio.to_thread(self._process.join, 5)
            if self._process.is_alive():
                self._process.kill()
                await asyncio.to_thread(self._process.join)
        self._thread.shutdown(wait=False)
        if self._arena is not None:
            self._arena.close()

    async def _call(self, command: str, *arguments: Any) -> Any:
        async with self._turn:
            return await self._exchange(command, arguments)

    async def _call_with_arrivals(self, command: str, arrivals: Sequence[Arrival]) -> Any:
        """Like :meth:`_call`; the payloads go through the arena."""
        async with self._turn:
            assert self._arena is not None
            arrays = [array for a in arrivals for array in _arrays(a).values()]
            places = self._arena.write(arrays)
            if places is None:
                needed = sum(array.nbytes for array in arrays)
                raise TrunkFailed(
                    f"a merged step of {needed} bytes does not fit the shared memory of "
                    f"{self._arena_bytes}; raise trunk.arena_mb or lower trunk.max_rows"
                )
            rest = iter(places)
            described = []
            for a in arrivals:
                where = {name: next(rest) for name in _arrays(a)}
                described.append((_without_arrays(a), where))
            return await self._exchange(command, (described,))

    async def _exchange(self, command: str, arguments: Any) -> Any:
        """Send a command, wait for the result in a thread of its own.

        A caller that is cancelled still leaves the pipe in step: the answer is awaited first.
        """
        future = asyncio.get_running_loop().run_in_executor(
            self._thread, self._blocking, command, arguments
        )
        try:
            failure, result = await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(TrunkFailed):
                await future
            raise
        if failure is not None:
            raise TrunkFailed(f"the trunk failed in {command}: {failure}")
        return result

    def _blocking(self, command: str, arguments: Any) -> Any:
        assert self._pipe is not None
        try:
            self._pipe.send((command, arguments))
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise TrunkFailed(
                f"the trunk's process ended with exit code {self._process.exitcode} in {command}"
            ) from error


def _work(
    pipe: Connection,
    arena_name: str,
    model: SplitModel,
    device: str,
    held_out: tuple[Array, Array] | None,
    threads: int,
) -> None:
    """The worker's loop: one command, one answer ``(failure or None, result)``."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the hub, which then stops us
    if threads:
        torch.set_num_threads(threads)
    arena = Arena(name=arena_name)
    core = TrunkCore(model, device, held_out)

    def arrivals(described: list[Any]) -> Iterator[Arrival]:
        for arrival, where in described:
            yield _with_arrays(arrival, {key: arena.read(place) for key, place in where.items()})

    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the hub has gone
        while True:
            command, arguments = pipe.recv()
            if command == "stop":
                pipe.send((None, None))
                break
            try:
                if command == "step":
                    result: Any = core.step(_owned(core, arrivals(*arguments)))
                elif command in ("answer", "features"):
                    result = getattr(core, command)(next(arrivals(*arguments)))
                elif command == "hello":
                    result = None
                else:
                    result = getattr(core, command)(*arguments)
                pipe.send((None, result))
            except Exception as error:
                pipe.send((f"{type(error).__name__}: {error}", None))
    arena.close()


def _owned(core: TrunkCore, arrivals: Iterator[Arrival]) -> list[Arrival]:
    """Arrivals that outlive this step, where the trunk keeps them for later passes on the CPU."""
    if not core.keeps_memory:
        return list(arrivals)
    return [
        _with_arrays(a, {key: array.copy() for key, array in _arrays(a).items()}) for a in arrivals
    ]


def _arrays(arrival: Arrival) -> dict[tuple[str, str], Array]:
    """What of an arrival goes through the arena, by where it belongs."""
    arrays = {("parts", name): part for name, part in arrival.parts.items()}
    if arrival.labels is not None:
        arrays["labels", ""] = arrival.labels
    if arrival.present is not None:
        arrays["present", ""] = arrival.present
    if arrival.finished is not None:
        arrays |= {("gradient", name): part for name, part in arrival.finished.gradient.items()}
    return arrays


def _without_arrays(arrival: Arrival) -> Arrival:
    finished = arrival.finished and dataclasses.replace(arrival.finished, gradient={})
    return dataclasses.replace(arrival, parts={}, labels=None, present=None, finished=finished)


def _with_arrays(arrival: Arrival, arrays: Mapping[tuple[str, str], Array]) -> Arrival:
    def of(what: str) -> dict[str, Array]:
        return {name: array for (where, name), array in arrays.items() if where == what}

    finished = arrival.finished and dataclasses.replace(arrival.finished, gradient=of("gradient"))
    return dataclasses.replace(
        arrival,
        parts=of("parts"),
        labels=arrays.get(("labels", "")),
        present=arrays.get(("present", "")),
        finished=finished,
    )
