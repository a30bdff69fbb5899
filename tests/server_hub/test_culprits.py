"""The search for batches that end the trunk's process, with processes that are played."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.protocol.batch import Batch
from server_hub.trunk import process as trunk_process
from server_hub.trunk.culprits import joined, without_culprits
from server_hub.trunk.errors import TrunkFailed, TrunkRefused, WorkerDied
from server_hub.trunk.interface import Query, StepInput, StepReport, TrunkPlan
from server_hub.trunk.process import WorkerTrunk
from tests.lib.tasks import run
from tests.lib.trunk_models import dense_model, state_of

DEATH = WorkerDied("the trunk's process ended with exit code 7 in step")


def batch(device: str, number: int) -> StepInput:
    """Return a batch with a row, whose label tells it apart."""
    return StepInput(device, "shared", 1, "fp16", Batch({}, np.array([number])))


def number_of(batch: StepInput) -> int:
    assert batch.batch.labels is not None
    return int(batch.batch.labels[0])


class Process:
    """A process that ends at some batches, and then forgets what it has trained."""

    def __init__(self, killers: set[int], most_rows: int = 1000) -> None:
        self.killers, self.most_rows = killers, most_rows
        self.trained: list[int] = []
        self.deaths = 0

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        assert inputs
        numbers = [number_of(i) for i in inputs]
        if self.killers & set(numbers) or len(numbers) > self.most_rows:
            self.trained.clear()
            self.deaths += 1
            raise DEATH
        self.trained += numbers
        each = [(float(n), 1) for n in numbers]
        gradients = [{"h": np.array([n])} for n in numbers]
        return StepReport(sum(numbers) / len(numbers), len(numbers), {}, gradients, each)


@given(
    owners=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    guilty=st.sets(st.integers(0, 39), max_size=5),
)
def test_all_batches_of_devices_that_are_not_to_blame_are_trained_once(
    owners: list[int], guilty: set[int]
) -> None:
    inputs = [batch(f"device-{owner}", n) for n, owner in enumerate(owners)]
    killers = {n for n in guilty if n < len(inputs)}
    if not killers:
        return
    process = Process(killers)
    report, culprits = run(without_culprits(process.step, inputs, DEATH))
    blamed = {inputs[n].device for n in killers}
    want = [n for n, i in enumerate(inputs) if i.device not in blamed]
    assert culprits == report.refused == dict.fromkeys(blamed, str(DEATH))
    assert sorted(process.trained) == want
    assert [loss and loss[0] for loss in report.losses] == [
        float(n) if n in want else None for n in range(len(inputs))
    ]
    if want:
        assert [g and g["h"][0] for g in report.gradients] == [
            n if n in want else None for n in range(len(inputs))
        ]
    assert report.rows == len(want)
    assert report.loss == pytest.approx(np.mean(want)) if want else math.isnan(report.loss)
    # the search for each of them goes down a path of halves
    assert process.deaths <= len(blamed) * math.ceil(math.log2(len(inputs)))


def test_a_step_that_is_too_large_for_the_process_is_halved_and_nobody_is_to_blame() -> None:
    inputs = [batch(f"device-{n % 3}", n) for n in range(16)]
    process = Process(set(), most_rows=4)
    report, culprits = run(without_culprits(process.step, inputs, DEATH))
    assert culprits == report.refused == {}
    assert sorted(process.trained) == list(range(16))
    assert report.rows == 16


def test_one_of_256_batches_is_found_in_eight_restarts() -> None:
    inputs = [batch(f"device-{n}", n) for n in range(256)]
    process = Process({77})
    report, culprits = run(without_culprits(process.step, inputs, DEATH))
    assert culprits.keys() == {"device-77"}
    assert process.deaths == 8
    assert report.rows == 255


def test_what_a_half_says_of_devices_is_in_the_whole_report() -> None:
    one = StepReport(2.0, 4, {"a": "not finite"}, (), [None, (8.0, 4)])
    other = StepReport(math.nan, 0, {"c": "too large"}, (), [None], ["e"])
    whole = joined(4, [([2, 0], one), ([1], other)], {"d": "to blame"})
    assert whole == StepReport(
        2.0,
        4,
        {"a": "not finite", "c": "too large", "d": "to blame"},
        (),
        [(8.0, 4), None, None, None],
        ["e"],
    )


# --- a trunk whose processes are played -----------------------------------------------------------


class PlayedProcess:
    """Stands in for a worker process; it ends at inputs of devices whose name begins with "evil".

    Attributes:
        starts: number of processes so far.
    """

    starts = 0

    def __init__(self, *options: object) -> None:
        type(self).starts += 1

    async def start(self, payload: bytes) -> None:
        pass

    async def send(
        self, command: str, arguments: tuple[Any, ...], limit_s: float | None
    ) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        inputs = {"step": lambda: arguments[0], "answer": lambda: arguments}.get(command, tuple)()
        if any(i.device.startswith("evil") for i in inputs):
            answer.set_exception(WorkerDied(f"the trunk's process ended in {command}"))
        else:
            report = StepReport(1.0, len(inputs), {}, (), [(1.0, 1)] * len(inputs))
            answer.set_result((None, {"step": report, "finish": []}.get(command)))
        return answer

    async def idle(self) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[PlayedProcess]:
    """The class of the processes that a trunk starts in a test."""

    class Counted(PlayedProcess):
        pass

    monkeypatch.setattr(trunk_process, "WorkerProcess", Counted)
    return Counted


async def begun() -> WorkerTrunk:
    trunk = WorkerTrunk(dense_model(), "cpu")
    await trunk.start()
    await trunk.begin(state_of(dense_model()), TrunkPlan("sgd", {}))
    return trunk


def of_devices(*names: str) -> list[StepInput]:
    return [batch(name, number) for number, name in enumerate(names)]


def test_a_device_causes_few_restarts_in_the_whole_job(played: type[PlayedProcess]) -> None:
    async def test() -> None:
        trunk = await begun()
        for _ in range(10):
            report = await trunk.step(of_devices("a", "evil", "b", "evil", "c", "d", "e", "f"))
            assert report.refused == {"evil": "the trunk's process ended in step"}
            assert report.rows == 6
            with pytest.raises(TrunkRefused, match="ended in step"):
                await trunk.answer(Query(1, "fp16", {}, device="evil"))
            await trunk.finish()
            await trunk.begin({}, TrunkPlan("sgd", {}))
        assert played.starts == 1 + 5

    run(test())


def test_one_device_after_the_other_ends_the_process_and_the_job_goes_on(
    played: type[PlayedProcess],
) -> None:
    async def test() -> None:
        trunk = await begun()
        for number in range(8):
            assert (await trunk.step(of_devices(f"evil-{number}"))).rows == 0
            with pytest.raises(TrunkRefused, match="ended in answer"):
                await trunk.answer(Query(1, "fp16", {}, device=f"evil-too-{number}"))
            assert (await trunk.step(of_devices("a", "b"))).rows == 2
        assert played.starts == 1 + 8 * 2 * 2
        with pytest.raises(TrunkFailed, match="33 times because of batches of devices without"):
            await trunk.step(of_devices("evil-at-last"))

    run(test())


@pytest.mark.parametrize("evil", [16, 17])
def test_restarts_because_of_devices_are_bounded(evil: int, played: type[PlayedProcess]) -> None:
    async def test() -> None:
        trunk = await begun()
        inputs = of_devices(*(f"evil-{number}" for number in range(evil)))
        if evil == 16:
            assert (await trunk.step(inputs)).refused.keys() == {i.device for i in inputs}
            assert (await trunk.step(of_devices("a"))).rows == 1
        else:
            with pytest.raises(TrunkFailed, match="33 times because of batches"):
                await trunk.step(inputs)
        assert played.starts == 33

    run(test())
