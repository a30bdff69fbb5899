"""The trunk in its own process: equal results, and errors of the process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.sync.client import connect

from edge_sdk.errors import ConfigError
from export.cutting.split_model import SplitModel
from server_hub.methods.method import ALL_PATHS
from server_hub.trunk.errors import TrunkFailed, TrunkRefused
from server_hub.trunk.evaluator import Evaluator
from server_hub.trunk.interface import Query, StepInput, Trunk, TrunkCopy, TrunkPlan
from server_hub.trunk.local import LocalTrunk
from server_hub.trunk.process import WorkerTrunk
from server_hub.trunk.step import TrunkTrainer
from tests.lib.tasks import run
from tests.lib.trunk_models import (
    BusyBlock,
    DyingBlock,
    FragileBlock,
    SleepingBlock,
    arrival_of,
    conv_model,
    dense_model,
    inputs,
    model_with_a_lambda,
    no_model,
    poisoned,
    slow_model,
    state_of,
)

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
TIMEOUT_S = 90.0
ARENA = 2**20


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

    run(test(), TIMEOUT_S)


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

    run(test(), TIMEOUT_S)


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
            (reason,) = (await trunk.step([wrong])).refused.values()
            assert re.search("IndexError: .*99", reason)
            unknown = dataclasses.replace(fine[0], codec="zip")
            (reason,) = (await trunk.step([unknown])).refused.values()
            assert "ExportError: unknown" in reason
            with pytest.raises(TrunkRefused, match="KeyError"):
                await trunk.answer(query_of(model, 1, 4, 1))
            with pytest.raises(TrunkFailed, match="the trunk failed in evaluate: "):
                await trunk.evaluate({"s": (1, "int8")}, ALL_PATHS)
            assert_same(await trunk.step(fine), core.step(fine))
            assert_same(await trunk.finish(), core.finish())

    run(test(), TIMEOUT_S)


async def killed(sparing: int = -1) -> int:
    """Kill the worker as soon as it is another one than ``sparing``; return its process id."""
    await until(lambda: any(c.pid != sparing for c in multiprocessing.active_children()))
    pid = worker_pid()
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_worker_that_is_killed_is_started_again_from_the_start_of_the_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was trained is lost; what is under way is done by the new process."""

    async def test() -> None:
        model = dense_model()
        core, evaluator = TrunkTrainer(dense_model(), "cpu"), Evaluator(dense_model(), "cpu")
        state = state_of(model)
        evaluator.serve({2: state})
        async with worker(model, held_out=inputs(model, 8, seed=1)) as trunk:
            await trunk.serve({2: state})
            await trunk.begin(state, TrunkPlan("sgd", HYPER))
            await trunk.step([arrival_of(model, 1, 3, 9)])
            memory, pid = shared_memory(), await killed()
            steps = [[arrival_of(model, 1, 3, seed)] for seed in (1, 2)]
            question = query_of(model, 2, 4, 3)
            one, other, answer, report = await asyncio.gather(
                trunk.step(steps[0]),
                trunk.step(steps[1]),
                trunk.answer(question),
                trunk.evaluate({"m": (2, "int8")}, ALL_PATHS),
            )
            assert worker_pid() != pid
            assert not any(path.exists() for path in memory)
            core.begin(state, TrunkPlan("sgd", HYPER))
            assert_same([one, other], [core.step(step) for step in steps])
            assert_same(answer, evaluator.answer(question))
            assert report.accuracy.keys() == {"m"}
            assert_same(await trunk.finish(), core.finish())

    run(test(), TIMEOUT_S)
    (message,) = (r.message for r in caplog.records)  # whichever call notices it first
    assert re.fullmatch(
        r"the trunk's process ended with exit code -9 in \w+; "
        r"it is started again from the start of the round",
        message,
    )


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_job() -> None:
    async def test() -> None:
        model = dense_model()
        question = query_of(model, 2, 4, 3)
        async with worker(model) as trunk:
            await trunk.serve({2: state_of(model)})
            await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
            pid = -1
            for _ in range(3):
                pid = await killed(sparing=pid)
                assert (await trunk.answer(question)).shape[1] == 4
            await killed(sparing=pid)
            with pytest.raises(TrunkFailed, match=r"exit code -9 .* that was 4 times without"):
                await trunk.answer(question)
        assert not multiprocessing.active_children()

    run(test(), TIMEOUT_S)


@pytest.mark.slow
def test_a_batch_that_ends_the_worker_is_refused_and_the_job_goes_on() -> None:
    async def test() -> None:
        model = slow_model(DyingBlock())
        good = arrival_of(model, 1, 2, 1)
        killer = dataclasses.replace(arrival_of(model, 1, 7, 2), device="killer")
        async with worker(model) as trunk:
            await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
            reports = await asyncio.gather(trunk.step([killer]), trunk.step([good]))
            assert reports[0].refused.keys() == {"killer"}
            assert "exit code 7" in reports[0].refused["killer"]
            assert (reports[1].refused, reports[1].rows) == ({}, 2)
            await trunk.finish()

    run(test(), TIMEOUT_S)


@pytest.mark.slow
def test_a_merged_step_that_ends_the_worker_is_made_without_the_device_to_blame(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of a half that was trained before another one ended the process is missing."""

    async def test() -> None:
        model = slow_model(FragileBlock())
        plan = TrunkPlan("sgd", HYPER, returned=True)
        batches = [arrival_of(model, 3, 2, n, f"device-{n % 3}", codec="fp16") for n in range(4)]
        batches[2] = poisoned(batches[2])
        good = [b for b in batches if b.device != "device-2"]
        question = query_of(model, 3, 2, 50)
        async with worker(model) as trunk:
            await trunk.serve({3: state_of(model)})
            await trunk.begin(state_of(model), plan)
            report, other, _ = await asyncio.gather(
                trunk.step(batches), trunk.step(good[:1]), trunk.answer(question)
            )
            reason = "the trunk's process ended with exit code 7 in step"
            assert report.refused == {"device-2": reason}
            assert report.rows == sum(b.rows for b in good)
            given = [b.device != "device-2" for b in batches]
            assert [loss is not None for loss in report.losses] == given
            assert [gradient is not None for gradient in report.gradients] == given
            assert (other.refused, other.rows) == ({}, 2)

            # it is not tried again, and nothing has to be started again for that
            pid = worker_pid()
            again = await trunk.step(batches)
            assert (again.refused, again.rows) == (report.refused, report.rows)
            assert (await trunk.step(batches[2:3])).refused == report.refused
            with pytest.raises(TrunkRefused, match="exit code 7"):
                await trunk.answer(dataclasses.replace(question, device="device-2"))
            assert worker_pid() == pid
            samples = {copy.layer: copy.samples for copy in await trunk.finish()}
            # the other step may have been made, and lost, before the search
            assert samples["block.3"] - 2 * report.rows in (0, other.rows)

    run(test(), 2 * TIMEOUT_S)
    assert len([m for m in caplog.messages if "it is started again" in m]) == 4
    assert any("device-2 is to blame" in message for message in caplog.messages)


@pytest.mark.slow
def test_a_question_that_ends_the_worker_is_refused_and_its_device_from_then_on() -> None:
    async def test() -> None:
        model = slow_model(FragileBlock())
        fine = arrival_of(model, 3, 2, 1, codec="fp16")
        bad = Query(3, "fp16", poisoned(fine).batch.parts, device="killer")
        async with worker(model) as trunk:
            await trunk.serve({3: state_of(model)})
            await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
            for _ in range(3):
                with pytest.raises(TrunkRefused, match="exit code 7 in answer"):
                    await trunk.answer(bad)
            assert (await trunk.step([fine])).rows == 2
            assert (await trunk.step([dataclasses.replace(fine, device="killer")])).rows == 0

    run(test(), TIMEOUT_S)


@pytest.mark.slow
def test_a_step_that_takes_too_long_ends_the_worker_and_not_the_job() -> None:
    async def test() -> None:
        model = slow_model(DyingBlock(sleeps=True))
        async with worker(model, step_s=10.0) as trunk:
            await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
            report = await trunk.step([arrival_of(model, 1, 7, 1)])
            (reason,) = report.refused.values()
            assert reason == "the trunk's process made no answer in step within 10 s"
            assert (await trunk.step([arrival_of(model, 1, 2, 2)])).rows == 2

    run(test(), TIMEOUT_S)


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

    run(test(), TIMEOUT_S)


def test_a_device_that_torch_does_not_have_is_a_failure_to_start(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        trunk = WorkerTrunk(dense_model(), "nonsense", arena_bytes=ARENA, threads=1)
        with pytest.raises(TrunkFailed, match=r"process cannot start: RuntimeError: .*nonsense"):
            await trunk.start()
        await trunk.close()

    run(test(), TIMEOUT_S)
    assert capfd.readouterr().err == "", "one sentence, and no traceback"


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of shared memory that a test makes; tests of other processes make some as well."""
    made: list[Path] = []

    class Recorded(SharedMemory):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(*args, **kwargs)
            finally:
                made.append(Path("/dev/shm", self.name))

    monkeypatch.setattr("server_hub.trunk.shared_memory.SharedMemory", Recorded)
    return made


def test_an_arena_that_does_not_fit_is_one_sentence_that_names_the_setting(
    reserved: list[Path],
) -> None:
    async def test(arena: int) -> None:
        trunk = WorkerTrunk(dense_model(), "cpu", arena_bytes=arena)
        with pytest.raises(ConfigError, match=r"no room .* MiB are free .*; set arena_mb"):
            await trunk.start()
        await trunk.close()

    for arena in (4 * shutil.disk_usage("/dev/shm").total, 2**62):
        run(test(arena), TIMEOUT_S)
    assert reserved
    assert not any(path.exists() for path in reserved)


def test_a_model_with_a_lambda_is_one_sentence_and_closes_at_once() -> None:
    async def test() -> None:
        model = dense_model()
        model.block[0].linear.forward = lambda h: h  # type: ignore[method-assign]
        trunk = WorkerTrunk(model, "cpu", arena_bytes=ARENA)
        with pytest.raises(TrunkFailed, match=r"a lambda.*MODULE:FUNCTION"):
            await trunk.start()
        began = time.monotonic()
        await trunk.close()
        assert time.monotonic() - began < 1.0

    run(test(), TIMEOUT_S)


def test_a_model_that_its_function_builds_in_the_worker_may_hold_a_lambda() -> None:
    async def test() -> None:
        async with worker(model_with_a_lambda) as trunk:
            await trunk.begin(state_of(dense_model()), TrunkPlan("sgd", HYPER))

    run(test(), TIMEOUT_S)


def test_a_function_that_fails_in_the_worker_says_why() -> None:
    async def test() -> None:
        trunk = WorkerTrunk(no_model, "cpu", arena_bytes=ARENA)
        with pytest.raises(ConfigError, match="no such model"):
            await trunk.start()
        await trunk.close()

    run(test(), TIMEOUT_S)


MODEL_HERE = """
class Mine(DenseBlock):
    pass

def model_of_script():
    return SplitModel(nn.Linear(5, WIDTH), [DenseBlock(), Mine()], nn.Linear(WIDTH, CLASSES))
"""

MAIN = """
import asyncio
from torch import nn
from export.cutting.split_model import SplitModel
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.process import WorkerTrunk
from tests.lib.trunk_models import CLASSES, WIDTH, DenseBlock, dense_model, state_of
{definitions}
async def main():
    model = {model}()
    trunk = WorkerTrunk(model, "cpu", arena_bytes=2**20, threads=1)
    try:
        await trunk.start()
        await trunk.begin(state_of(model), TrunkPlan("sgd", {{}}))
        print("it trains")
    except Exception as error:
        print(error)
    finally:
        await trunk.close()

{guard}asyncio.run(main())
"""

SCRIPTS = {
    "no guard": ("", "dense_model", "", "it trains"),
    "a guard and a class": (
        MODEL_HERE, "model_of_script", 'if __name__ == "__main__": ', "it trains"
    ),
    "no guard and a class": (
        MODEL_HERE, "model_of_script", "", 'Mine, .* under if __name__ == "__main__":, or move Mine'
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=() if "no guard" in what else pytest.mark.slow)
        for what in (*SCRIPTS, "a notebook")
    ],
)
def test_a_script_works_or_says_what_to_do(tmp_path: Path, what: str) -> None:
    """A user's module with a name of the standard library is no obstacle either."""
    notebook = what == "a notebook"
    definitions, model, guard, said = SCRIPTS["a guard and a class" if notebook else what]
    code = MAIN.format(definitions=definitions, model=model, guard=guard)
    script = tmp_path / "script.py"
    script.write_text(code)
    (tmp_path / "elsewhere").mkdir()
    for name in ("random", "pickle", "export"):
        (tmp_path / "elsewhere" / f"{name}.py").write_text("raise SystemExit(3)")
    done = subprocess.run(
        [sys.executable, "-P", *(["-c", code] if notebook else [str(script)])],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    want = "defined in a notebook .* Move it to a .py file" if notebook else said
    assert re.search(want, done.stdout), done.stdout
    assert len(done.stdout.splitlines()) <= 2
    assert done.stderr == ""


# --- closing --------------------------------------------------------------------------------------


def test_close_leaves_no_process_and_no_shared_memory() -> None:
    async def test() -> None:
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
        await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("trunk")])

    run(test(), TIMEOUT_S)


def test_close_in_the_middle_of_a_long_step() -> None:
    async def test() -> None:
        model = slow_model(SleepingBlock(60.0))
        trunk = WorkerTrunk(model, "cpu", arena_bytes=ARENA, threads=1)
        await trunk.start()
        pid = worker_pid()
        await trunk.begin(state_of(model), TrunkPlan("sgd", HYPER))
        steps = [asyncio.create_task(trunk.step([arrival_of(model, 1, 3, i)])) for i in (1, 2, 3)]
        await asyncio.sleep(0.2)
        for step in steps:
            step.cancel()
        began = time.monotonic()
        await trunk.close()
        assert time.monotonic() - began < 5.0
        assert not is_running(pid)

    run(test(), TIMEOUT_S)


def test_close_before_start() -> None:
    async def test() -> None:
        await WorkerTrunk(dense_model(), "cpu", arena_bytes=ARENA).close()

    run(test(), TIMEOUT_S)
    assert not [child for child in multiprocessing.active_children() if child.name == "trunk"]


@pytest.mark.parametrize("when", ["at once", "while torch is loaded"])
def test_close_of_a_start_that_was_given_up(when: str, reserved: list[Path]) -> None:
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
        await trunk.close()
        assert not any(path.exists() for path in reserved)
        assert not multiprocessing.active_children()
        assert when == "at once" or not is_running(pid)

    run(test(), TIMEOUT_S)


SCRIPT = """
import asyncio, multiprocessing, os, signal, sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.process import WorkerTrunk
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

    run(test(), TIMEOUT_S)
