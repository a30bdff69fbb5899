"""The search for batches that end the trunk's process, with a process that is played."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.protocol.messages import Batch
from server_hub.trunk.culprits import joined, without_culprits
from server_hub.trunk.errors import WorkerDied
from server_hub.trunk.interface import StepInput, StepReport
from tests.lib.tasks import run

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


def test_what_a_half_refuses_itself_is_refused_in_the_whole_report() -> None:
    one = StepReport(2.0, 4, {"a": "not finite"}, (), [None, (8.0, 4)])
    other = StepReport(math.nan, 0, {"c": "too large"}, (), [None])
    whole = joined(4, [([2, 0], one), ([1], other)], {"d": "to blame"})
    assert whole == StepReport(
        2.0,
        4,
        {"a": "not finite", "c": "too large", "d": "to blame"},
        (),
        [(8.0, 4), None, None, None],
    )
