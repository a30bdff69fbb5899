"""Downloads: several requests at a time, answers that are lost, reordered, repeated or wrong."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import BundleError, HubError, LinkClosed
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import VERSION, Blob, BlobGet, Error, Hello, Message, Welcome
from edge_sdk.transport.blob_requests import MOST_OPEN, BlobRequests
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.link import Link, MemoryLink
from server_hub.simulation import clock
from server_hub.simulation.clock import VirtualLoop

HASH = "0" * 64
OTHER = "1" * 64
WELCOME = Welcome(VERSION, "phone", "small", "s", False, 0, HASH, 8, 2**20)


def content(size: int) -> bytes:
    """Return bytes in which every place is another."""
    return random.Random(size).randbytes(size)


def piece(data: bytes, offset: int, size: int, name: str = HASH) -> Blob:
    return Blob(hash=name, offset=offset, size=len(data), data=data[offset : offset + size])


@given(
    size=st.integers(0, 300),
    have=st.integers(0, 300),
    events=st.lists(
        st.tuples(
            st.sampled_from(["answer", "answer", "answer", "reorder", "lose", "repeat", "break"]),
            st.integers(1, 40),
        ),
        max_size=60,
    ),
)
def test_every_byte_arrives_once_in_order(
    size: int, have: int, events: list[tuple[str, int]]
) -> None:
    """Answers are lost, reordered and repeated, and the hub changes the size of its pieces."""
    have = min(size, have)
    data, got = content(size), bytearray(content(size)[:have])
    requests = BlobRequests(HASH, have, size)
    queue: list[BlobGet] = []
    now = 0.0

    def ask() -> None:
        queue.extend(requests.due(now))
        assert requests.open <= MOST_OPEN

    for event, step in events:
        now += 0.3
        ask()
        if event == "break":
            queue.clear()
            requests.ask_again()
        elif queue:
            request = queue.pop(-1 if event == "reorder" else 0)
            answer = piece(data, request.offset, step)
            if event != "lose":
                got += requests.take(answer, now)
            if event == "repeat":
                assert requests.take(answer, now) == b""
    for _ in range(10 * size + 10):  # the network is well again, and loses only what it had lost
        ask()
        if requests.done:
            break
        if queue:
            request = queue.pop(0)
            got += requests.take(piece(data, request.offset, 7), now)
        else:
            requests.ask_again()
    assert requests.done
    assert got == data


def test_the_number_of_open_requests_grows_on_a_fast_link_and_shrinks_on_a_slow_one() -> None:
    data = content(1000)
    requests = BlobRequests(HASH, 0, 1000)
    queue = requests.due(0.0)
    assert [request.offset for request in queue] == [0], "the size of a piece is not known yet"
    most = []
    for now in [0.1 * n for n in range(1, 12)] + [20.0 * n for n in range(1, 12)]:
        requests.take(piece(data, queue.pop(0).offset, 10), now)
        queue += requests.due(now)
        most.append(requests.open)
    assert most[:9] == [2, 3, 4, 5, 6, 7, 8, 8, 8]
    assert most[-1] == 2
    assert requests.patience_s > 100, "a slow link is given time"


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Blob(HASH, 0, 1001, b"x"), "has 1001 bytes; it may have 1000"),
        (Blob(HASH, 0, 10, bytes(11)), "more of blob"),
        (Blob(HASH, 0, 10, b""), "empty piece"),
    ],
)
def test_a_hub_that_sends_more_than_the_blob_may_have_is_refused(answer: Blob, what: str) -> None:
    requests = BlobRequests(HASH, 0, 1000)
    requests.due(0.0)
    with pytest.raises(BundleError, match=what):
        requests.take(answer, 0.0)


def test_the_size_of_a_blob_does_not_change() -> None:
    requests = BlobRequests(HASH, 0, 1000)
    requests.due(0.0)
    requests.take(Blob(HASH, 0, 100, bytes(10)), 0.0)
    requests.due(0.0)
    with pytest.raises(BundleError, match="has 200 bytes, and said 100"):
        requests.take(Blob(HASH, 10, 200, bytes(10)), 0.0)


class SlowHub:
    """A hub whose answers take a second each, and which cuts its first links after some.

    Args:
        data: content of the blob that it has.
        cuts: number of answers after which each of the first links breaks.
    """

    def __init__(self, data: bytes, cuts: list[int]) -> None:
        self._data, self._cuts = data, cuts
        self.asked: list[int] = []
        self._serving: list[asyncio.Task[None]] = []

    async def open(self) -> Link:
        mine, theirs = MemoryLink.pair()
        self._serving.append(asyncio.create_task(self._serve(theirs)))
        return mine

    async def _serve(self, link: Link) -> None:
        assert isinstance(decode(await link.receive()).message, Hello)
        await link.send(encode(WELCOME, 0, 0))
        left = self._cuts.pop(0) if self._cuts else 10**6
        try:
            while left:
                request = decode(await link.receive()).message
                if not isinstance(request, BlobGet):
                    continue
                left -= 1
                await asyncio.sleep(1.0)
                answer: Message = piece(self._data, request.offset, 100)
                if request.hash == OTHER:
                    answer = Error(code="unknown_blob", message="gone", fatal=False, field="hash")
                else:
                    self.asked.append(request.offset)
                await link.send(encode(answer, 0, 0))
        except LinkClosed:
            return
        await link.close()


def test_a_download_goes_on_over_links_that_break_and_asks_for_little_twice() -> None:
    async def main(loop: VirtualLoop) -> None:
        data = content(2000)
        hub = SlowHub(data, [3, 5, 0, 2])
        connection = Connection(hub.open, token="t", tier=None, patience_s=60)
        await connection.open()
        got = bytearray()
        await connection.download(HASH, 0, got.extend, 2000)
        assert got == data
        assert len(hub.asked) <= 20 + 4
        await connection.close("done")

    clock.run(main)


def test_errors_of_a_download_that_is_over_do_not_end_the_next() -> None:
    async def main(loop: VirtualLoop) -> None:
        data = content(2000)
        hub = SlowHub(data, [])
        connection = Connection(hub.open, token="t", tier=None, patience_s=60)
        await connection.open()
        given_up = asyncio.create_task(connection.download(OTHER, 0, bytearray().extend, 10))
        await asyncio.sleep(0.5)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        got = bytearray()
        await connection.download(HASH, 0, got.extend, 2000)
        assert got == data
        with pytest.raises(HubError, match="gone"):
            await connection.download(OTHER, 0, bytearray().extend, 10)
        await connection.close("done")

    clock.run(main)
