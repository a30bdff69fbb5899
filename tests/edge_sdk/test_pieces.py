"""Long messages in pieces: exactly once, in order, with little sent twice, within limits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import LinkClosed, ProtocolError
from edge_sdk.protocol import pieces
from edge_sdk.protocol.channel import Channel, Delivery
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode, encode, encode_message
from edge_sdk.protocol.messages import Ack, Answer, Blob, Infer, Message, Piece, Ready, Update
from edge_sdk.transport import flow
from edge_sdk.transport.flow import Backlog, FlowControl, TokenBucket
from edge_sdk.transport.link import MemoryLink
from edge_sdk.transport.session import Session
from tests.lib.session_model import Sessions, walk
from tests.lib.tasks import run

AGREED = frozenset({"pieces"})
SIZE = 64


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Pieces of 64 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", SIZE)
        yield


def update(size: int, number: int = 1) -> Update:
    """Return an update with ``size`` bytes, which differ from those of another number."""
    data = np.frombuffer(random.Random(number).randbytes(size), np.uint8)
    return Update(round=number, tensors={"w": data}, done=True, samples=1, metrics={})


def same(one: Message | None, other: Message) -> bool:
    return one is not None and encode_message(one) == encode_message(other)


def channel(**options: Any) -> Channel:
    return Channel(extensions=AGREED, **options)


def frames_of(sender: Channel, *messages: Message) -> list[bytes]:
    """Return all frames of some messages, in the order in which a session sends them."""
    frames = []
    for message in messages:
        frame = sender.send(message)
        frames += [] if frame is None else [frame]
    while (piece := sender.next()) is not None:
        frames.append(piece[1])
    return frames


# --- the channel --------------------------------------------------------------------------------


class SessionsInPieces(Sessions):
    """The model of all events, with messages that travel in up to seven pieces."""

    agreed = AGREED


SessionsInPieces.TestCase.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None
)
test_exactly_once_in_pieces = SessionsInPieces.TestCase


def test_exactly_once_in_pieces_on_long_walks() -> None:
    effects = 0
    for seed in range(60):
        walker = SessionsInPieces()
        walk(walker, seed, steps=400)
        effects += len(walker.archive) + sum(len(side.effects) for side in walker.side)
    assert effects > 1000, "the walks must get somewhere"


@given(st.integers(1, 1000), st.lists(st.integers(0, 30), max_size=8))
def test_a_message_arrives_over_breaks_and_only_what_was_under_way_comes_again(
    size: int, breaks: list[int]
) -> None:
    """After each break the sender goes on with what the receiver lacks."""
    a, b, sent = channel(), channel(), update(size)
    under_way = frames_of(a, sent)
    whole = len(under_way)
    got: list[Delivery] = []
    passed = 0
    for arrives in [*breaks, 10**6]:
        for frame in under_way[:arrives]:
            passed += 1
            delivery = b.receive(frame)
            got += [] if delivery is None else [delivery]
        for delivery in got:
            b.settle(delivery.seq)
        under_way = a.resume(b.settled)
    assert passed == whole
    assert len(got) == 1
    assert same(got[0].message, sent)
    assert under_way == []
    assert a.unacked == 0


def test_short_messages_travel_whole_and_peers_without_the_extension_get_whole_frames() -> None:
    a = channel()
    frame = a.send(update(SIZE // 2))
    assert frame is not None
    assert isinstance(decode(frame).message, Update)
    old = Channel().send(update(10 * SIZE))
    assert old is not None
    assert isinstance(decode(old).message, Update)


def test_questions_and_answers_go_between_pieces_and_other_messages_wait() -> None:
    a, b = channel(), channel()
    assert a.send(update(5 * SIZE)) is None
    frames = [a.next()[1]]  # type: ignore[index]
    assert a.send(Ready(samples=3)) is None
    question = a.send(Infer(request=1, parts={}))
    answer = a.send(Answer(request=1, heads=[], logits=np.zeros(2, np.float32)))
    assert question is not None
    assert answer is not None
    frames += [question, answer]
    while (piece := a.next()) is not None:
        frames.append(piece[1])
    kinds = [d.message.TYPE for frame in frames if (d := b.receive(frame)) is not None]
    assert kinds == ["infer", "answer", "update", "ready"]


def test_pieces_do_not_use_up_the_window() -> None:
    a, b = channel(window=2), channel(window=2)
    frames = frames_of(a, Ready(samples=1), update(50 * SIZE))
    assert a.full
    first, *rest = [b.receive(frame) for frame in frames]
    assert first is not None
    assert same(rest[-1].message if rest[-1] else None, update(50 * SIZE))
    assert b.settled == 0, "the first one takes long"
    b.settle(first.seq)
    assert b.settled == len(frames) - 1
    b.settle(len(frames))
    a.receive(b.send(Ack()) or b"")
    assert (a.unacked, a.full) == (0, False)


def test_the_window_counts_messages_in_pieces() -> None:
    a, b = channel(window=9), channel(window=2)
    for frame in frames_of(a, update(3 * SIZE), update(3 * SIZE)):
        b.receive(frame)
    *most, last = frames_of(a, update(3 * SIZE))
    for frame in most:
        b.receive(frame)
    with pytest.raises(ProtocolError) as caught:
        b.receive(last)
    assert caught.value.code == ErrorCode.WINDOW_EXCEEDED


def test_a_message_over_the_limit_is_not_sent() -> None:
    a = channel(peer_max_message=1000)
    with pytest.raises(ProtocolError, match=r"update has 1\d{3} bytes, the peer takes 1000"):
        a.send(update(1000))
    assert (a.unacked, a.next()) == (0, None)


def piece_frames(data: bytes, size: int = SIZE) -> list[bytes]:
    """Return the frames of any bytes in pieces."""
    cuts = range(0, len(data), size)
    return [
        encode(Piece(data=data[i : i + size], last=i + size >= len(data)), n, 0, AGREED)
        for n, i in enumerate(cuts, 1)
    ]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        pytest.param(piece_frames(encode_message(update(200)), 63), "bad_message", id="short"),
        pytest.param(piece_frames(encode_message(update(200)), 65), "bad_message", id="long"),
        pytest.param([encode(Piece(b"", True), 1, 0, AGREED)], "bad_message", id="empty"),
        pytest.param(piece_frames(encode_message(update(1000))), "frame_too_big", id="too large"),
        pytest.param(piece_frames(b"\x93" + bytes(200)), "bad_frame", id="no pair"),
        pytest.param(piece_frames(bytes(200)), "bad_frame", id="no array"),
        pytest.param(piece_frames(b"\x92\xa3new" + bytes(200)), "unknown_type", id="unknown"),
        pytest.param(piece_frames(b"\x92\x01" + bytes(200)), "unknown_type", id="a number"),
        pytest.param(
            piece_frames(encode_message(Blob("0" * 64, 0, 300, bytes(300)))),
            "bad_message",
            id="unreliable",
        ),
        pytest.param(
            piece_frames(encode_message(Piece(bytes(300)), AGREED)), "bad_message", id="pieces"
        ),
        pytest.param(piece_frames(encode_message(update(200))[:-1]), "bad_frame", id="cut off"),
        pytest.param(piece_frames(encode_message(update(200)) + b"\x00"), "bad_frame", id="more"),
        pytest.param(
            piece_frames(msgpack.packb(["update", {"x": [[[[0]]]], "y": bytes(99)}])),
            "bad_frame",
            id="deep",
        ),
        pytest.param(
            piece_frames(msgpack.packb(["update", {"unknown": bytes(300)}])),
            "bad_message",
            id="field",
        ),
    ],
)
def test_bad_pieces(frames: list[bytes], code: str) -> None:
    b = channel(max_message=1000)
    code_of = None
    for frame in frames:
        try:
            b.receive(frame)
        except ProtocolError as error:
            code_of = error.code
            break
    assert code_of == code
    assert b.assembling[1] <= 1000


def test_pieces_are_unknown_to_peers_that_have_not_agreed() -> None:
    with pytest.raises(ProtocolError) as caught:
        Channel().receive(piece_frames(bytes(10))[0])
    assert caught.value.code == ErrorCode.UNKNOWN_TYPE


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_in_pieces_are_a_message_or_an_error(data: bytes) -> None:
    b = channel()
    try:
        for frame in piece_frames(data):
            b.receive(frame)
    except ProtocolError:
        pass
    assert b.assembling[1] <= len(data)


# --- sessions -----------------------------------------------------------------------------------


def test_sessions_send_pieces_and_count_them_as_what_they_are_of() -> None:
    async def test() -> None:
        ours, theirs = MemoryLink.pair()
        traffic: dict[str, int] = {}

        def count(kind: str, up: int, down: int) -> None:
            traffic[kind] = traffic.get(kind, 0) + up

        backlog = Backlog(10**6)
        control = FlowControl(Backlog(10**6), backlog, TokenBucket(1.0, 5.0))  # not of pieces
        hub, device = Session(channel(), count, control), Session(channel())
        got: list[Message] = []
        held: list[int] = []

        def handle(delivery: Delivery) -> None:
            got.append(delivery.message)
            held.append(backlog.bytes)
            hub.settle(delivery.seq)

        tasks = [
            asyncio.create_task(hub.run(ours, 0, handle)),
            asyncio.create_task(device.run(theirs, 0, lambda d: None)),
        ]
        sent = [update(1000, 1), update(10, 2), update(3000, 3)]
        for message in sent:
            await device.send(message)
        while device.channel.unacked:
            await asyncio.sleep(0.01)
        assert all(map(same, got, sent))
        assert len(got) == 3
        assert held[0] > 1000
        assert backlog.bytes == 0
        assert traffic["update"] > 4000
        assert set(traffic) <= {"update", "ack"}
        await device.lose("done")
        await asyncio.gather(*tasks, return_exceptions=True)

    run(test())


def test_blobs_and_pieces_take_turns() -> None:
    async def test() -> None:
        ours, theirs = MemoryLink.pair()
        session = Session(channel())
        task = asyncio.create_task(session.run(ours, 0, lambda d: None))
        await asyncio.sleep(0)
        for n in range(4):
            session.post(Blob("0" * 64, n, 300, b"x"))
        session.post(update(4 * SIZE - 100))
        session.post(Answer(request=1, heads=[], logits=np.zeros(2, np.float32)))
        kinds = [decode(await theirs.receive(), agreed=AGREED).message.TYPE for _ in range(9)]
        assert kinds[0] == "answer"
        assert kinds[1:7] in (["piece", "blob"] * 3, ["blob", "piece"] * 3)
        await session.lose("done")
        with pytest.raises(LinkClosed):
            await task

    run(test())


def test_the_message_that_began_first_goes_on_when_the_memory_of_all_is_used_up() -> None:
    whole = Backlog(100)
    one, other, third = (Backlog(1000, whole) for _ in range(3))
    one.begin()
    one.add(60)
    other.begin()
    other.add(60)
    assert (one.full, other.full, third.full) == (False, True, False)
    one.add(500)
    assert (one.full, other.full) == (False, True)
    one.complete()
    assert other.full is False
    assert one.full


def test_a_message_that_does_not_go_on_while_others_wait_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow, "STALLED_S", 0.1)

    async def test() -> None:
        whole = Backlog(100)

        def give_up() -> None:
            lazy.clear()
            lazy.complete()

        lazy = Backlog(10**6, whole, give_up)
        other = Backlog(10**6, whole)
        for backlog in (lazy, other):
            backlog.begin()
            backlog.add(60)
        room = asyncio.create_task(other.room())
        await asyncio.sleep(0.15)
        assert not room.done()
        lazy.add(100_000)  # it does go on
        await asyncio.sleep(0.12)
        assert not room.done()
        await asyncio.wait_for(room, 1)
        assert lazy.bytes == 0

    run(test())
