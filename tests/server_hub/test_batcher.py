"""The step batcher: the batches of a step, the number of steps under way, and their costs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.protocol.batch import Batch
from server_hub.trunk.batcher import PendingBatch, StepBatcher
from server_hub.trunk.interface import StepInput, StepReport
from server_hub.trunk.process import TrunkFailed
from server_hub.trunk.settings import TrunkTraining
from tests.lib.tasks import run

ROWS = 4
"""Rows of a batch."""


class HandTrunk:
    """A trunk whose steps end when the test tells them to."""

    def __init__(self, steps_at_once: int) -> None:
        self.steps_at_once = steps_at_once
        self.begun: list[list[str]] = []
        self.ends: list[asyncio.Future[None]] = []

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        self.begun.append([i.device for i in inputs])
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]
        rows = sum(i.rows for i in inputs)
        return StepReport(1.0, rows, {}, (), [(float(i.rows), i.rows) for i in inputs])

    def end(self, number: int) -> None:
        self.ends[number].set_result(None)


def batch(device: str) -> PendingBatch:
    """Return a batch of a device, in round 1."""
    labels = np.zeros(ROWS, np.int64)
    step_input = StepInput(device, "trunk", 1, "fp16", Batch(parts={}, labels=labels))

    def nothing(_: object) -> None:
        return

    return PendingBatch(1, 0, step_input, reply=nothing, refuse=nothing, give_up=nothing)


class Running:
    """A running batcher with its trunk."""

    def __init__(self, steps_at_once: int = 2, max_rows: int = 2 * ROWS, wait_s: float = 0.02):
        self.trunk = HandTrunk(steps_at_once)
        settings = TrunkTraining(max_rows=max_rows, mix_rows=0, wait_s=wait_s)
        self.batcher = StepBatcher(self.trunk, settings, merges=True)  # type: ignore[arg-type]
        self.batcher.begin(1, shuffles=False)
        self.task = asyncio.create_task(self.batcher.run())

    async def put(self, *devices: str) -> list[bool]:
        """Give batches to the batcher; return a list that grows when one of them is settled."""
        settled: list[bool] = []
        for device in devices:
            self.batcher.put(batch(device)).when_complete(lambda: settled.append(True))
        await asyncio.sleep(0.005)
        return settled

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def test_as_many_steps_are_under_way_as_the_trunk_takes_at_once_in_their_order() -> None:
    async def test(steps_at_once: int) -> None:
        running = Running(steps_at_once)
        trunk = running.trunk
        settled = await running.put("a", "b", "c", "d", "e", "f")
        groups = [["a", "b"], ["c", "d"], ["e", "f"]]
        assert trunk.begun == groups[:steps_at_once]
        assert settled == []
        trunk.end(0)
        await asyncio.sleep(0.005)
        assert trunk.begun == groups[: steps_at_once + 1]
        assert len(settled) == 2
        await running.stop()

    for steps_at_once in (1, 2):
        run(test(steps_at_once))


def test_a_device_with_many_batches_delays_another_one_by_no_step() -> None:
    async def test() -> None:
        running = Running(steps_at_once=1)
        trunk = running.trunk
        await running.put(*"aaaaaabc")
        for number in range(3):
            trunk.end(number)
            await asyncio.sleep(0.005)
        assert trunk.begun == [["a", "b"], ["c", "a"], ["a", "a"], ["a", "a"]]
        await running.stop()

    run(test())


def test_rows_are_waited_for_as_long_as_a_step_is_under_way() -> None:
    """A half-filled step would only wait behind the running step."""

    async def test() -> None:
        running = Running()
        trunk = running.trunk
        await running.put("a", "b", "c")
        await asyncio.sleep(0.06)  # three times as long as the batcher waits for rows
        assert trunk.begun == [["a", "b"]]
        await running.put("d")
        assert trunk.begun == [["a", "b"], ["c", "d"]]
        await running.put("e")
        trunk.end(0)
        await asyncio.sleep(0.06)
        assert len(trunk.begun) == 2
        trunk.end(1)
        await asyncio.sleep(0.06)
        assert trunk.begun[2] == ["e"]
        await running.stop()

    run(test())


def test_the_end_of_a_round_waits_for_every_step() -> None:
    async def test() -> None:
        running = Running()
        trunk = running.trunk
        settled = await running.put("a", "b", "c")
        drained = asyncio.create_task(running.batcher.drain())
        await asyncio.sleep(0.005)
        assert trunk.begun == [["a", "b"], ["c"]], "no rows are waited for any more"
        trunk.end(1)
        await asyncio.sleep(0.005)
        assert not drained.done()
        trunk.end(0)
        await drained
        assert len(settled) == 3
        assert (running.batcher.totals.steps, running.batcher.totals.rows) == (2, 3 * ROWS)
        await running.stop()

    run(test())


def test_time_with_two_steps_under_way_counts_once() -> None:
    async def test() -> None:
        running = Running()
        await running.put("a", "b", "c", "d")
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
        running.trunk.end(0)
        await asyncio.sleep(0.1)
        running.trunk.end(1)
        await running.batcher.drain()
        spent = asyncio.get_running_loop().time() - began
        assert 0.2 <= running.batcher.totals.seconds <= spent + 0.05
        await running.stop()

    run(test())


@pytest.mark.parametrize("returned", [True, False])
def test_devices_do_not_wait_for_gradients_of_a_trunk_that_has_diverged(returned: bool) -> None:
    """They are given up, and not to blame; without returned gradients nobody waits."""

    async def diverged(inputs: Sequence[StepInput]) -> StepReport:
        each = [None] * len(inputs)
        devices = [i.device for i in inputs]
        return StepReport(math.nan, 0, {}, each if returned else (), each, devices)

    async def test() -> None:
        running = Running()
        running.trunk.step = diverged  # type: ignore[method-assign]
        refused: list[str] = []
        given_up: list[str] = []
        for device in ("a", "b"):
            running.batcher.put(
                replace(batch(device), refuse=refused.append, give_up=given_up.append)
            )
        await running.batcher.drain()
        assert refused == []
        assert given_up == ["training diverged on the trunk, which gives no gradients"] * (
            2 if returned else 0
        )
        await running.stop()

    run(test())


def test_a_step_that_fails_ends_the_batcher_and_its_other_steps() -> None:
    async def test() -> None:
        running = Running()
        await running.put("a", "b", "c", "d")
        running.trunk.ends[0].set_exception(TrunkFailed("the trunk's process ended"))
        with pytest.raises(TrunkFailed, match="process ended"):
            await running.task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(test())
