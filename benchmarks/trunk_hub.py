"""The measured hub: a real hub in a separate process that runs rounds on command.

A :class:`RoundGate` holds the rounds back and lets a number of them pass. The trunk is the real
trunk inside a :class:`MeasuredTrunk`, which records the time of each call and the batches of each
merged step. A hub with a :class:`NullTrunk` shows how fast the same devices can feed it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import multiprocessing as mp
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks.bare_process import MAX_NORM, RATE, Composition
from benchmarks.replay import read_batches, read_devices
from benchmarks.trunk_workloads import TOKENS, get_workload
from edge_sdk.protocol.tensors import State
from export.cutting.split_model import SplitModel
from server_hub.config import HubConfig
from server_hub.gateway.limits import Limits, Listen
from server_hub.hub import Hub
from server_hub.methods.settings import LocalTraining
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import StepInput, StepReport, Trunk, TrunkCopy, TrunkPlan
from server_hub.trunk.process import WorkerTrunk
from server_hub.trunk.settings import TrunkTraining

T = TypeVar("T")


@dataclass(frozen=True)
class HubJob:
    """The job of a measured hub.

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
        rounds: number of rounds.
        seconds: seconds from the start of the first round until the last round has ended and its
            files are written; they include all costs of a round.
        rows: rows of the batches that the trunk received.
        steps: the batches of each merged step, in order.
        calls: seconds in the trunk's calls as the hub measures them, by name of the call. For
            steps, the seconds in which at least one step was under way.
        hub_cpu_s: processor time of the hub's process.
        trunk_cpu_s: processor time of the trunk's process; 0 if there is none.
    """

    rounds: int
    seconds: float = 0.0
    rows: int = 0
    steps: list[Composition] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    hub_cpu_s: float = 0.0
    trunk_cpu_s: float = 0.0


class NullTrunk:
    """Implements the training part of :class:`Trunk` without training.

    It acknowledges batches at once.
    """

    steps_at_once = 1

    async def start(self) -> None:
        pass

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        pass

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        return StepReport(math.nan, sum(i.rows for i in inputs), {}, (), [None] * len(inputs))

    async def finish(self) -> list[TrunkCopy]:
        return []

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        pass

    async def close(self) -> None:
        pass


class MeasuredTrunk:
    """Implements :class:`Trunk` around another trunk, and measures the current turn.

    Args:
        inner: the trunk that does the work.
        numbers: number of each batch, by device and bytes of the labels.
    """

    def __init__(self, inner: Any, numbers: Mapping[tuple[str, bytes], int]) -> None:
        self._inner, self._numbers = inner, numbers
        self._under_way, self._busy_since = 0, 0.0
        self.turn = Turn(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        await self._timed("begin", self._inner.begin(state, plan))

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        if not self._under_way:
            self._busy_since = time.perf_counter()
        self._under_way += 1
        try:
            report: StepReport = await self._inner.step(inputs)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._spent("step", self._busy_since)
        self.turn.steps.append([self._known(i) for i in inputs])
        self.turn.rows += sum(i.rows for i in inputs)
        return report

    async def finish(self) -> list[TrunkCopy]:
        return await self._timed("finish", self._inner.finish())

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        await self._timed("serve", self._inner.serve(states, bases))

    async def _timed(self, name: str, call: Awaitable[T]) -> T:
        began = time.perf_counter()
        try:
            return await call
        finally:
            self._spent(name, began)

    def _spent(self, name: str, began: float) -> None:
        spent = time.perf_counter() - began
        self.turn.calls[name] = self.turn.calls.get(name, 0.0) + spent

    def _known(self, step_input: StepInput) -> tuple[str, int]:
        labels = step_input.batch.labels
        assert labels is not None
        return step_input.device, self._numbers[step_input.device, labels.tobytes()]


class RoundGate:
    """Holds the rounds of a hub back, and lets a number of them pass.

    Args:
        hub: the hub; its rounds wait from now on.
        trunk: the trunk of the hub.
    """

    def __init__(self, hub: Hub, trunk: MeasuredTrunk) -> None:
        self._hub, self._trunk = hub, trunk
        self._open, self._closed = asyncio.Event(), asyncio.Event()
        self._left, self._began = 0, 0.0
        job = hub._job
        job.run_round = self._gated(job.run_round)  # type: ignore[method-assign]

    async def rounds(self, count: int) -> Turn:
        """Let ``count`` rounds pass; return their measurements."""
        turn = self._trunk.turn = Turn(count)
        before = _cpu_seconds()
        self._left = count
        self._closed.clear()
        self._began = time.perf_counter()
        self._open.set()
        await self._closed.wait()
        turn.hub_cpu_s, turn.trunk_cpu_s = (
            now - then for now, then in zip(_cpu_seconds(), before, strict=True)
        )
        return turn

    def _gated(self, run_round: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        async def gated() -> None:
            if self._open.is_set() and self._left == 0:
                await self._hub.round_log.finished()
                self._trunk.turn.seconds = time.perf_counter() - self._began
                self._open.clear()
                self._closed.set()
            await self._open.wait()
            self._left -= 1
            await run_round()

        return gated


def _cpu_seconds() -> tuple[float, float]:
    """Return the processor time of this process and of its children, in seconds."""
    ticks = os.sysconf("SC_CLK_TCK")
    children = 0.0
    for child in mp.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        children += (int(fields[11]) + int(fields[12])) / ticks
    return time.process_time(), children


def make_hub(job: HubJob) -> tuple[Hub, RoundGate]:
    """Return a hub for a prepared workload, and the gate of its rounds."""
    workload, devices = get_workload(job.model, job.device), read_devices(job.folder)
    settings = TrunkTraining(
        device=job.device,
        optimizer=workload.optimizer,  # type: ignore[arg-type]
        hyper={"lr": RATE},
        precision=job.mode,  # type: ignore[arg-type]
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
    trunk = MeasuredTrunk(NullTrunk() if job.null else _worker(model, job, settings), numbers)
    hub = Hub(config, model, cast(Trunk, trunk))
    return hub, RoundGate(hub, trunk)


def _worker(model: SplitModel, job: HubJob, settings: TrunkTraining) -> Trunk:
    return WorkerTrunk(
        model, job.device, arena_bytes=settings.arena_mb * 2**20, threads=settings.threads
    )


def serve(pipe: Connection, job: HubJob) -> None:
    """Run the process of a hub.

    It first sends its address over the pipe. For each number from the pipe it lets as many rounds
    pass and answers with a :class:`Turn`. ``"stop"`` ends it.
    """
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    asyncio.run(_serve(pipe, job))


async def _serve(pipe: Connection, job: HubJob) -> None:
    hub, gate = make_hub(job)
    gc.collect()
    gc.freeze()  # as ``cutlayer hub`` does
    serving = asyncio.create_task(hub.serve(pipe.send))
    commands = asyncio.create_task(_obey(pipe, gate))
    done, _ = await asyncio.wait([serving, commands], return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, commands):
        task.cancel()
    await asyncio.gather(serving, commands, return_exceptions=True)
    for task in done:
        task.result()


async def _obey(pipe: Connection, gate: RoundGate) -> None:
    while True:
        command: Any = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        if command == "stop":
            return
        pipe.send(await gate.rounds(command))
