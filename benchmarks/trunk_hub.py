"""The hub under measurement: a real hub in a process of its own that runs rounds when told to.

Its trunk is the real one behind a :class:`MeasuredTrunk`, which lets a number of rounds pass, notes
how long each call takes and which batches each step merged. A hub with a :class:`NullTrunk` shows
how fast the same devices can feed it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.trunk_workloads import TOKENS, get_workload, read_batches, read_devices
from edge_sdk.protocol.tensors import Array
from export.split import SplitModel
from server_hub.config import HubConfig, Limits, Listen, LocalTraining, TrunkTraining
from server_hub.hub import Hub
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import (
    Arrival,
    MixtureEvaluation,
    State,
    StepReport,
    Trunk,
    TrunkCopy,
    TrunkPlan,
)
from server_hub.trunk.process import WorkerTrunk

T = TypeVar("T")

Composition = list[tuple[str, int]]
"""A merged step: device and number of each of its batches."""

RATE = 1e-3
"""Learning rate of the trunk and of the bare loop."""

MAX_NORM = 25.0
"""Gradients of a step are scaled down to this norm, in the trunk and in the bare loop."""


@dataclass(frozen=True)
class HubJob:
    """What a measured hub serves.

    Attributes:
        folder: a prepared workload.
        run: folder for the hub's own files.
        model: name of the workload.
        device: torch device of the trunk.
        mode: precision of the trunk, ``fp32`` or ``bf16``.
        threads: torch threads of the trunk's process.
        null: whether the trunk does nothing.
    """

    folder: Path
    run: Path
    model: str
    device: str
    mode: str
    threads: int
    null: bool = False


@dataclass
class Turn:
    """Some rounds of a hub.

    Attributes:
        rounds: how many.
        seconds: from the start of the first round to the start of the round after the last, so
            that everything a round costs is in it.
        rows: rows that the trunk has used.
        steps: what each merged step had, in order.
        calls: seconds in each of the trunk's calls, as the hub sees them.
    """

    rounds: int
    seconds: float = 0.0
    rows: int = 0
    steps: list[Composition] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)


class NullTrunk:
    """Implements :class:`Trunk` and trains nothing: batches are acknowledged at once."""

    async def start(self) -> None:
        pass

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        pass

    async def features(self, arrival: Arrival) -> dict[str, Array] | None:
        raise NotImplementedError("a null trunk has no features")

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        return StepReport(math.nan, sum(a.rows for a in arrivals), {}, (), [None] * len(arrivals))

    async def finish(self) -> list[TrunkCopy]:
        return []

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        pass

    async def answer(self, arrival: Arrival) -> Array:
        raise NotImplementedError("a null trunk has no answers")

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        return {}

    async def evaluate_bases(self) -> MixtureEvaluation:
        raise NotImplementedError("a null trunk has no base networks")

    async def close(self) -> None:
        pass


class MeasuredTrunk:
    """Implements :class:`Trunk` around another; rounds wait at their beginning until released.

    Args:
        inner: does the work.
        numbers: number of each batch, by device and bytes of the labels.
    """

    def __init__(self, inner: Trunk, numbers: Mapping[tuple[str, bytes], int]) -> None:
        self._inner, self._numbers = inner, numbers
        self._released, self._over = asyncio.Event(), asyncio.Event()
        self._left, self._began = 0, 0.0
        self._turn = Turn(0)

    async def rounds(self, count: int) -> Turn:
        """Let so many rounds pass; returns what they were like."""
        self._turn = turn = Turn(count)
        self._left = count
        self._over.clear()
        self._began = time.perf_counter()
        self._released.set()
        await self._over.wait()
        return turn

    async def start(self) -> None:
        await self._inner.start()

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        if self._released.is_set() and self._left == 0:
            self._turn.seconds = time.perf_counter() - self._began
            self._released.clear()
            self._over.set()
        await self._released.wait()
        self._left -= 1
        await self._timed("begin", self._inner.begin(state, plan))

    async def features(self, arrival: Arrival) -> dict[str, Array] | None:
        return await self._timed("features", self._inner.features(arrival))

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        report = await self._timed("step", self._inner.step(arrivals))
        self._turn.steps.append([self._known(arrival) for arrival in arrivals])
        self._turn.rows += sum(arrival.rows for arrival in arrivals)
        return report

    async def finish(self) -> list[TrunkCopy]:
        return await self._timed("finish", self._inner.finish())

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        await self._timed("serve", self._inner.serve(states, bases))

    async def answer(self, arrival: Arrival) -> Array:
        return await self._timed("answer", self._inner.answer(arrival))

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        return await self._timed("evaluate", self._inner.evaluate(tiers))

    async def evaluate_bases(self) -> MixtureEvaluation:
        return await self._timed("evaluate_bases", self._inner.evaluate_bases())

    async def close(self) -> None:
        await self._inner.close()

    async def _timed(self, name: str, call: Awaitable[T]) -> T:
        began = time.perf_counter()
        try:
            return await call
        finally:
            spent = time.perf_counter() - began
            self._turn.calls[name] = self._turn.calls.get(name, 0.0) + spent

    def _known(self, arrival: Arrival) -> tuple[str, int]:
        assert arrival.labels is not None
        return arrival.device, self._numbers[arrival.device, arrival.labels.tobytes()]


def make_hub(job: HubJob) -> tuple[Hub, MeasuredTrunk]:
    """A hub for a prepared workload, and its trunk."""
    workload, devices = get_workload(job.model, job.device), read_devices(job.folder)
    if job.mode != "fp32":
        raise NotImplementedError(f"the trunk has no mode {job.mode} yet")
    settings = TrunkTraining(
        device=job.device,
        optimizer=workload.optimizer,  # type: ignore[arg-type]
        hyper={"lr": RATE},
        max_rows=workload.max_rows,
        max_norm=MAX_NORM,
        threads=job.threads,
    )
    config = HubConfig(
        bundles=job.folder / "bundles",
        tokens=job.folder / TOKENS,
        run=job.run,
        schedule="constant",
        listen=Listen(port=0),
        rounds=RoundRules(count=10**6, min_devices=len(devices), deadline_s=3600),
        local=LocalTraining(batch_size=workload.batch),
        trunk=settings,
        limits=Limits(connections=len(devices) + 16),
    )
    model = workload.model()
    numbers = {
        (device.name, batch.labels.tobytes()): number
        for device in devices
        for number, batch in enumerate(read_batches(job.folder, device.name))
        if batch.labels is not None
    }
    inner: Trunk = NullTrunk() if job.null else _worker(model, job, settings)
    trunk = MeasuredTrunk(inner, numbers)
    return Hub(config, model, trunk), trunk


def _worker(model: SplitModel, job: HubJob, settings: TrunkTraining) -> Trunk:
    return WorkerTrunk(
        model, job.device, arena_bytes=settings.arena_mb * 2**20, threads=settings.threads
    )


def serve(pipe: Connection, job: HubJob) -> None:
    """A process with a hub.

    It sends its address; then each number that comes over the pipe lets so many rounds pass and is
    answered with a :class:`Turn`. ``"stop"`` ends it.
    """
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    asyncio.run(_serve(pipe, job))


async def _serve(pipe: Connection, job: HubJob) -> None:
    hub, trunk = make_hub(job)
    gc.collect()
    gc.freeze()  # as the command does
    serving = asyncio.create_task(hub.serve(pipe.send))
    commands = asyncio.create_task(_obey(pipe, trunk))
    done, _ = await asyncio.wait([serving, commands], return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, commands):
        task.cancel()
    await asyncio.gather(serving, commands, return_exceptions=True)
    for task in done:
        task.result()


async def _obey(pipe: Connection, trunk: MeasuredTrunk) -> None:
    while True:
        command: Any = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        if command == "stop":
            return
        pipe.send(await trunk.rounds(command))
