"""Turns: large questions of one device do not delay the small ones of another."""

from __future__ import annotations

import asyncio

import pytest

from server_hub.concurrency import Turns
from tests.lib.tasks import run


def test_owners_take_turns_one_task_at_a_time() -> None:
    async def test() -> None:
        turns, order, inside = Turns(), [], 0

        async def work(owner: str) -> None:
            nonlocal inside
            async with turns.turn(owner):
                inside += 1
                assert inside == 1
                order.append(owner)
                await asyncio.sleep(0.001)
                inside -= 1

        await asyncio.gather(*(work(o) for o in ("a", "a", "a", "a", "b", "c", "b")))
        assert order == ["a", "a", "b", "c", "a", "b", "a"]

    run(test(), 10)


def test_a_task_that_fails_or_is_cancelled_gives_its_turn_on() -> None:
    async def test() -> None:
        turns, done = Turns(), []

        async def work(name: str, fails: bool = False) -> None:
            async with turns.turn(name):
                await asyncio.sleep(0.01)
                if fails:
                    raise ValueError(name)
                done.append(name)

        tasks = [asyncio.create_task(work(n, n == "b")) for n in "abcde"]
        await asyncio.sleep(0)
        tasks[2].cancel()  # while it waits
        await asyncio.sleep(0.025)
        tasks[3].cancel()  # while it has its turn
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert done == ["a", "e"]
        assert [type(r) for r in results] == [
            type(None), ValueError, asyncio.CancelledError, asyncio.CancelledError, type(None),
        ]  # fmt: skip
        async with turns.turn("f"):
            pass

    run(test(), 10)


@pytest.mark.parametrize("late", [False, True])
def test_a_task_that_is_cancelled_at_the_moment_of_its_turn_gives_it_on(late: bool) -> None:
    async def test() -> None:
        turns, done = Turns(), []
        first = turns.turn("a")
        await first.__aenter__()

        async def work(name: str) -> None:
            async with turns.turn(name):
                done.append(name)

        b, c = asyncio.create_task(work("b")), asyncio.create_task(work("c"))
        await asyncio.sleep(0)
        if late:
            await first.__aexit__(None, None, None)
            b.cancel()
        else:
            b.cancel()
            await first.__aexit__(None, None, None)
        await asyncio.gather(b, c, return_exceptions=True)
        assert done == ["c"]

    run(test(), 10)
