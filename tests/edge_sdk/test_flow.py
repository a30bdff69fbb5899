"""Flow control: a session stops reading while too much waits, and loses nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_sdk.errors import LinkClosed
from edge_sdk.protocol.channel import Channel, Delivery
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import Blob, BlobGet, Bye, Message
from edge_sdk.transport.flow import Backlog, FlowControl, TokenBucket
from edge_sdk.transport.link import MemoryLink
from edge_sdk.transport.session import Session
from tests.lib.tasks import run

HASH = "0" * 64


class StuckLink(MemoryLink):
    """A link whose frames leave only when the test lets them."""

    def __init__(self, *queues: Any) -> None:
        super().__init__(*queues)
        self.open = asyncio.Event()

    async def send(self, frame: bytes) -> None:
        await self.open.wait()
        await super().send(frame)


@given(st.lists(st.floats(0, 3), max_size=60))
def test_a_bucket_gives_its_burst_and_then_its_rate(pauses: list[float]) -> None:
    """A token is refused only when as many were taken as the burst and the rate give."""
    bucket, now, tokens = TokenBucket(rate=2.0, burst=5.0), 0.0, 5.0
    for pause in pauses:
        now += pause
        tokens = min(tokens + 2 * pause, 5.0)
        assume(abs(tokens - 1) > 1e-6)  # on the edge, rounding decides
        taken = bucket.try_take(now)
        assert taken == (tokens > 1)
        tokens -= taken


def test_a_bucket_says_how_long_to_wait() -> None:
    bucket = TokenBucket(rate=10.0, burst=2.0)
    assert [bucket.take(1.0) for _ in range(4)] == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert bucket.take(100.0) == 0.0


def test_a_backlog_is_full_by_its_own_bytes_or_by_those_of_all() -> None:
    whole = Backlog(100)
    one, other, idle = Backlog(60, whole), Backlog(60, whole), Backlog(60, whole)
    one.add(61)
    assert (one.full, other.full) == (True, False)
    one.remove(11)
    other.add(51)
    assert (whole.bytes, one.full, other.full, idle.full) == (101, True, True, False)
    other.clear()
    assert (whole.bytes, one.full) == (50, False)


def test_who_waits_for_room_in_all_goes_on_when_another_session_eases() -> None:
    async def test() -> None:
        whole = Backlog(100)
        one, other = Backlog(100, whole), Backlog(100, whole)
        one.add(50)
        other.add(60)
        room = asyncio.create_task(one.room())
        await asyncio.sleep(0.01)
        assert not room.done()
        other.remove(20)
        await asyncio.wait_for(room, 1)

    run(test())


def hub_session(outgoing: int = 10**9, incoming: int = 10**9, rate: float = 10**6) -> Session:
    flow = FlowControl(Backlog(outgoing), Backlog(incoming), TokenBucket(rate, rate))
    return Session(Channel(16), flow=flow)


def test_answers_that_are_not_read_stop_the_questions() -> None:
    """The peer has to wait; what it has asked is answered when it reads again."""

    async def test() -> None:
        queues: tuple[Any, Any] = asyncio.Queue(), asyncio.Queue()
        ours, theirs = StuckLink(*queues), MemoryLink(queues[1], queues[0])
        session = hub_session(outgoing=5_000)
        asked = 0

        def answer(delivery: Delivery) -> None:
            nonlocal asked
            asked += 1
            assert isinstance(delivery.message, BlobGet)
            session.post(
                Blob(hash=HASH, offset=delivery.message.offset, size=10**6, data=bytes(1000))
            )

        serving = asyncio.create_task(session.run(ours, 0, answer))
        for offset in range(200):
            await theirs.send(encode(BlobGet(hash=HASH, offset=offset), 0, 0))
        await asyncio.sleep(0.05)
        assert asked == 5, "six answers of a thousand bytes are above the limit"
        ours.open.set()
        offsets = [decode(await theirs.receive()).message.offset for _ in range(200)]  # type: ignore[attr-defined]
        assert offsets == list(range(200))
        await theirs.close()
        with pytest.raises(LinkClosed):
            await serving

    run(test())


def test_messages_that_are_not_settled_stop_the_next_ones() -> None:
    async def test() -> None:
        ours, theirs = MemoryLink.pair()
        session = hub_session(incoming=500)
        got: list[int] = []
        serving = asyncio.create_task(session.run(ours, 0, lambda d: got.append(d.seq)))
        for seq in range(1, 9):
            await theirs.send(encode(Bye(reason="x" * 200), seq, 0))
        await asyncio.sleep(0.05)
        assert got == [1, 2, 3]
        session.settle(2)
        await asyncio.sleep(0.05)
        assert got == [1, 2, 3, 4]
        await session.lose("for a test")
        with pytest.raises(LinkClosed):
            await serving

    run(test())


def test_a_link_that_breaks_while_its_peer_has_to_wait_is_noticed() -> None:
    async def test() -> None:
        queues: tuple[Any, Any] = asyncio.Queue(), asyncio.Queue()
        ours, theirs = StuckLink(*queues), MemoryLink(queues[1], queues[0])
        session = hub_session(outgoing=100)

        def answer(delivery: Delivery) -> None:
            session.post(Blob(hash=HASH, offset=0, size=10**6, data=bytes(1000)))

        serving = asyncio.create_task(session.run(ours, 0, answer))
        for _ in range(2):
            await theirs.send(encode(BlobGet(hash=HASH, offset=0), 0, 0))
        await asyncio.sleep(0.05)
        await ours.close()
        ours.open.set()
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(serving, 2)

    run(test())


def test_a_peer_that_sends_too_fast_is_slowed_down_and_loses_nothing() -> None:
    async def test() -> None:
        ours, theirs = MemoryLink.pair()
        flow = FlowControl(Backlog(10**9), Backlog(10**9), TokenBucket(100.0, 10.0))
        session = Session(Channel(16), flow=flow)
        got: list[Message] = []
        serving = asyncio.create_task(session.run(ours, 0, lambda d: got.append(d.message)))
        for offset in range(50):
            await theirs.send(encode(BlobGet(hash=HASH, offset=offset), 0, 0))
        began = asyncio.get_running_loop().time()
        while len(got) < 50:
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began > 0.3
        assert [m.offset for m in got] == list(range(50))  # type: ignore[attr-defined]
        await session.lose("for a test")
        with pytest.raises(LinkClosed):
            await serving

    run(test())
