"""The trunk in its own process: equal results, and errors of the process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.sync.client import connect

from export.split import SplitModel
from server_hub.methods.method import ALL_PATHS
from server_hub.trunk.evaluator import Evaluator
from server_hub.trunk.interface import Query, StepInput, Trunk, TrunkCopy, TrunkPlan
from server_hub.trunk.local import LocalTrunk
from server_hub.trunk.process import TrunkFailed, WorkerTrunk
from server_hub.trunk.step import TrunkTrainer
from tests.lib.trunk_models import (
    BusyBlock,
    SleepingBlock,
    arrival_of,
    conv_model,
    dense_model,
    inputs,
    slow_model,
    state_of,
)

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
TIMEOUT_S = 60.0
ARENA = 2**20


def run(test: Awaitable[None]) -> None:
    """Run a test; fail if it exceeds its time limit."""

    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test

    asyncio.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def worker(model: SplitModel, **options: Any) -> AsyncIterator[WorkerTrunk]:
    """Run a worker with one thread; close it at the end."""
    trunk = WorkerTrunk(model, "cpu", **{"arena_bytes": ARENA, "threads": 1, **options})
    try:
        await trunk.start()
        yield trunk
    finally:
        await trunk.close()


def worker_pid() -> int:
    """Return the process id of the only worker of this process."""
    (child,) = (c for c in multiprocessing.active_children() if c.name == "trunk")
    assert child.pid is not None
    return child.pid


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def shared_memory() -> list[Path]:
    """Return the files behind the shared memory of this process; there is at least one."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in maps if line.split()[-1].startswith("/dev/shm/psm_")}
    assert paths
    return [Path(path) for path in paths]


def bad(arrival: StepInput) -> StepInput:
    """Return the arrival with a value that is not finite."""
    parts = {name: np.array(part) for name, part in arrival.batch.parts.items()}
    parts["h.scale"].flat[0] = math.nan
    batch = dataclasses.replace(arrival.batch, parts=parts)
    return dataclasses.replace(arrival, device="bad", batch=batch)


def query_of(model: SplitModel, cut: int, rows: int, seed: int) -> Query:
    """Return a query with random activations."""
    arrival = arrival_of(model, cut, rows, seed)
    return Query(cut, arrival.codec, arrival.batch.parts)


# --- equal results --------------------------------------------------------------------------------


async def a_job(trunk: Trunk, model: SplitModel) -> list[Any]:
    """Run two rounds with every call of a trunk; return all results."""
    said: list[Any] = []
    state = state_of(model)
    for epochs in (1, 3):
        await trunk.begin(state, TrunkPlan("sgd", HYPER, epochs, max_rows=8, seed=epochs))
        for step in range(3):
            arrivals = [
                arrival_of(model, 1, 3, 10 * step, "a", "one"),
                bad(arrival_of(model, 2, 2, 10 * step + 1)),
                arrival_of(model, 2, 4, 10 * step + 2, "b", "one", "fp16"),
                arrival_of(model, 3, 2, 10 * step + 3, "c", "two", weight=2.0),
            ]
            said.append(await trunk.step(arrivals))
        copies = await trunk.finish()
        said.append(copies)
        shallow = {**state, **{n: t for c in copies if c.replica == "one" for n, t in
                               c.tensors.items()}}  # fmt: skip
        await trunk.serve({1: shallow, 2: state, 3: shallow})
        for cut in (1, 2, 3):
            said.append(await trunk.answer(query_of(model, cut, 5, 77 + cut)))
        tiers = {"s": (1, "int8"), "m": (2, "fp16"), "l": (3, "int8")}
        said.append(await trunk.evaluate(tiers, ALL_PATHS))
        state = shallow
    return said


def assert_same(got: Any, want: Any) -> None:
    """Check that values are equal bit for bit."""
    assert type(got) is type(want)
    if isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, TrunkCopy):
        assert (got.replica, got.layer, got.samples) == (want.replica, want.layer, want.samples)
        assert got.tensors.keys() == want.tensors.keys()
        for name, tensor in want.tensors.items():
            np.testing.assert_array_equal(got.tensors[name], tensor, err_msg=name)
    elif isinstance(want, np.ndarray):
        np.testing.assert_array_equal(got, want)
    else:
        assert got == want


def test_a_worker_says_what_a_local_trunk_says() -> None:
    """This includes several passes, whose arrivals outlive their shared memory."""

    async def test() -> None:
        model = conv_model()
        held_out = inputs(model, 40, seed=5)
        want = await a_job(LocalTrunk(conv_model(), "cpu", held_out), model)
        async with worker(model, held_out=held_out) as trunk:
            got = await a_job(trunk, model)
        assert [report.refused.keys() for report in want[:3]] == [{"bad"}] * 3
        assert_same(got, want)

    run(test())


def test_calls_that_come_at_once_take_turns() -> None:
    async def test() -> None:
        model = dense_model()
        state = state_of(model)
        core = TrunkTrainer(dense_model(), "cpu")
        evaluator = Evaluator(dense_model(), "cpu")
        evaluator.serve({2: state})
        core.begin(state, TrunkPlan("sgd", HYPER))
        questions = [query_of(model, 2, rows, 50 + rows) for rows in range(1, 20)]
        steps = [[arrival_of(model, 1, 3, seed)] for seed in range(len(questions))]
        async with worker(model) as trunk:
            await trunk.serve({2: state})
            await trunk.begin(state, TrunkPlan("sgd", HYPER))
            both = await asyncio.gather(
                asyncio.gather(*(trunk.answer(question) for question in questions)),
                asyncio.gather(*(trunk.step(step) for step in steps)),
            )
            assert_same(list(both[0]), [evaluator.answer(question) for question in questions])
            assert_same(list(both[1]), [core.step(step) for step in steps])
            assert_same(await trunk.finish(), core.finish())

    run(test())


# --- errors ---------------------------------------------------------------------------------------


def test_a_worker_goes_on_after_what_it_could_not_do() -> None:
    async def test() -> None:
        model = dense_model()
        state, plan = state_of(model), TrunkPlan("sgd", HYPER)
        core = TrunkTrainer(dense_model(), "cpu")
        core.begin(state, plan)
        fine = [arrival_of(model, 1, 4, 1)]
        async with worker(model, arena_bytes=4096) as trunk:
            await trunk.begin(state, plan)
            assert_same(await trunk.step(fine), core.step(fine))

            # inputs larger than the shared memory are sent in parts
            large = [arrival_of(model, 1, 400, seed, f"large-{seed}") for seed in (1, 2)]
            assert_same(await trunk.step(large), core.step(large))
            assert_same(await trunk.step(fine), core.step(fine))

            # an exception in the worker
            labels = np.full(4, 99)
            batch = dataclasses.replace(fine[0].batch, labels=labels)
            wrong = dataclasses.replace(fine[0], batch=batch)
            with pytest.raises(TrunkFailed, match=r"the trunk failed in step: IndexError: .*99"):
                await trunk.step([wrong])
            with pytest.raises(TrunkFailed, match="the trunk failed in step: ExportError: unknown"):
                await trunk.step([dataclasses.replace(fine[0], codec="zip")])
            with pytest.raises(TrunkFailed, match="the trunk failed in answer: KeyError"):
                await trunk.answer(query_of(model, 1, 4, 1))
            with pytest.raises(TrunkFailed, match="the trunk failed in evaluate: "):
                await trunk.evaluate({"s": (1, "int8")}, ALL_PATHS)
            assert_same(await trunk.step(fine), core.step(fine))
            assert_same(await trunk.finish(), core.finish())

    run(test())


def test_a_worker_that_is_killed_fails_at_once_and_leaves_nothing() -> None:
    async def test() -> None:
        model = slow_model(SleepingBlock(30.0))
        trunk = WorkerTrunk(model, "cpu", arena_bytes=ARENA, threads=1)
        await trunk.start()
        memory, pid = shared_memory(), worker_pid()
        await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
        step = asyncio.create_task(trunk.step([arrival_of(model, 1, 2, 1)]))
        queued = asyncio.create_task(trunk.answer(query_of(model, 1, 2, 2)))
        await asyncio.sleep(0.3)
        assert not step.done()
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(TrunkFailed, match="ended with exit code -9 in step"):
            await step
        with pytest.raises(TrunkFailed, match="ended with exit code -9 in answer"):
            await queued
        with pytest.raises(TrunkFailed, match="ended with exit code -9 in begin"):
            await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
        assert time.monotonic() - killed < 2.0
        await trunk.close()
        assert time.monotonic() - killed < 3.0
        assert not is_running(pid)
        assert not any(path.exists() for path in memory)

    run(test())


def test_a_worker_that_is_killed_while_idle_is_noticed_at_the_next_call() -> None:
    async def test() -> None:
        model = dense_model()
        async with worker(model) as trunk:
            os.kill(worker_pid(), signal.SIGKILL)
            started = time.monotonic()
            with pytest.raises(TrunkFailed, match="ended with exit code -9 in finish"):
                await trunk.finish()
            assert time.monotonic() - started < 2.0

    run(test())


def test_a_caller_that_gives_up_does_not_confuse_the_next() -> None:
    """The next payload does not overwrite one that is still in use."""

    async def test() -> None:
        model = slow_model(SleepingBlock(0.3))
        plan = TrunkPlan("sgd", HYPER)
        one, other = ([arrival_of(model, 1, 6, seed)] for seed in (1, 2))
        core = TrunkTrainer(model, "cpu")
        core.begin(state_of(model), plan)
        want = [core.step(one), core.step(other)]
        async with worker(model) as trunk:
            await trunk.begin(state_of(model), plan)
            first = asyncio.create_task(trunk.step(one))
            await asyncio.sleep(0.1)
            first.cancel()
            assert_same(await trunk.step(other), want[1])
            with pytest.raises(asyncio.CancelledError):
                await first
            assert_same(await trunk.finish(), core.finish())

    run(test())


def test_a_device_that_torch_does_not_have_is_a_failure_to_start(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        trunk = WorkerTrunk(dense_model(), "nonsense", arena_bytes=ARENA, threads=1)
        with pytest.raises(TrunkFailed, match="ended with exit code 1 in hello"):
            await trunk.start()
        memory = shared_memory()
        await trunk.close()
        assert not any(path.exists() for path in memory)

    run(test())
    assert "nonsense" in capfd.readouterr().err, "the worker said what was wrong"


# --- closing --------------------------------------------------------------------------------------


def test_close_leaves_no_process_and_no_shared_memory() -> None:
    async def test() -> None:
        before = set(os.listdir("/dev/shm"))
        model = dense_model()
        trunk = WorkerTrunk(model, "cpu", arena_bytes=ARENA, threads=1)
        await trunk.start()
        pid, memory = worker_pid(), shared_memory()
        assert is_running(pid)
        assert all(path.exists() for path in memory)
        await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER, epochs=2))
        await trunk.step([arrival_of(model, 1, 3, 1)])
        await trunk.close()
        assert not is_running(pid)
        assert pid not in [child.pid for child in multiprocessing.active_children()]
        assert not any(path.exists() for path in memory)
        assert not [name for name in os.listdir("/dev/shm")
                    if name not in before and str(os.getpid()) in name]  # fmt: skip
        await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("trunk")])

    run(test())


def test_close_before_start() -> None:
    async def test() -> None:
        await WorkerTrunk(dense_model(), "cpu", arena_bytes=ARENA).close()

    run(test())
    assert not [child for child in multiprocessing.active_children() if child.name == "trunk"]


@pytest.mark.parametrize("when", ["at once", "while torch is loaded"])
def test_close_of_a_start_that_was_given_up(when: str) -> None:
    async def test() -> None:
        trunk = WorkerTrunk(dense_model(), "cpu", arena_bytes=ARENA, threads=1)
        start = asyncio.create_task(trunk.start())
        if when == "at once":
            await asyncio.sleep(0)
        else:
            await until(lambda: bool(multiprocessing.active_children()))
            pid = worker_pid()
        assert not start.done()
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        memory = shared_memory()
        await trunk.close()
        assert not any(path.exists() for path in memory)
        assert not multiprocessing.active_children()
        assert when == "at once" or not is_running(pid)

    run(test())


SCRIPT = """
import asyncio, multiprocessing, os, signal, sys
from pathlib import Path
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.process import TrunkFailed, WorkerTrunk
from tests.lib.trunk_models import arrival_of, dense_model, state_of

async def main():
    model = dense_model()
    trunk = WorkerTrunk(model, "cpu", arena_bytes=2**20, threads=1)
    await trunk.start()
    (child,) = multiprocessing.active_children()
    maps = Path("/proc/self/maps").read_text().split()
    arenas = {word for word in maps if word.startswith("/dev/shm/psm_")}
    print(*(Path(arena).name for arena in arenas), flush=True)
    await trunk.begin(state_of(model), TrunkPlan("sgd", {}))
    if sys.argv[1] == "kill worker":
        os.kill(child.pid, signal.SIGKILL)
    if sys.argv[1] == "kill hub":
        print(child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    await trunk.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["close", "kill worker", "kill hub"])
def test_nothing_is_left_when_the_hub_has_ended(tmp_path: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), how],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    first, *rest = done.stdout.splitlines()
    arenas, pids = [Path("/dev/shm", name) for name in first.split()], "".join(rest).split()
    assert arenas
    gone = time.monotonic() + 10.0
    while any(a.exists() for a in arenas) or any(is_running(int(pid)) for pid in pids):
        assert time.monotonic() < gone, "the worker or its memory outlived the hub"
        time.sleep(0.05)
    if how == "kill hub":
        assert done.returncode == -signal.SIGKILL
        assert len(pids) == 1
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no complaints about leaks"


# --- a busy trunk ---------------------------------------------------------------------------------


async def largest_lag(work: Awaitable[Any]) -> float:
    """Return the largest lag of the event loop, in seconds, during some work."""
    task = asyncio.ensure_future(work)
    largest = 0.0
    while not task.done():
        due = time.monotonic() + 0.01
        await asyncio.sleep(0.01)
        largest = max(largest, time.monotonic() - due)
    await task
    return largest


async def answer_pings(connection: ServerConnection) -> None:
    """Serve a connection without sending anything; it answers pings."""
    await connection.wait_closed()


def ping(url: str, times: list[float], until: Callable[[], bool]) -> None:
    """A device in its own thread: record the seconds until each ping is answered."""
    with connect(url) as connection:
        while not until():
            started = time.monotonic()
            if not connection.ping().wait(5.0):
                times.append(math.inf)
                return
            times.append(time.monotonic() - started)
            time.sleep(0.02)


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection, whose pauses would be long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("block", [SleepingBlock, BusyBlock])
def test_the_event_loop_goes_on_while_the_worker_is_busy(
    block: Callable[[float], SleepingBlock | BusyBlock],
) -> None:
    async def test() -> None:
        model = slow_model(block(0.6))
        arrivals = [arrival_of(model, 1, 500, seed) for seed in range(8)]
        pings: list[float] = []
        done = threading.Event()
        async with (
            serve(answer_pings, "127.0.0.1", 0) as server,
            worker(model) as trunk,
        ):
            port = server.sockets[0].getsockname()[1]
            await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
            device = asyncio.create_task(
                asyncio.to_thread(ping, f"ws://127.0.0.1:{port}", pings, done.is_set)
            )

            async def steps() -> None:
                for _ in range(3):
                    report = await trunk.step(arrivals)
                    assert report.rows == 4000

            started = time.monotonic()
            lag = await largest_lag(steps())
            took = time.monotonic() - started
            done.set()
            await device
        assert took >= 1.8, "the steps were not long enough to block anything"
        assert lag < 0.25
        assert len(pings) > 20
        assert max(pings) < 1.0

    run(test())
