"""Exactly-once delivery over all events on two sides and the network between them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import settings

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.channel import CannotResume, Channel, Delivery, SequenceGap
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import Frame, decode, encode
from edge_sdk.protocol.messages import Ack, BlobGet, Decline, Ready
from tests.lib.session_model import Sessions, from_disk, message, number_of, to_disk, walk

Sessions.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
test_exactly_once = Sessions.TestCase


@pytest.mark.parametrize("group", range(4))
def test_exactly_once_on_long_walks(group: int) -> None:
    effects = 0
    for seed in range(100 * group, 100 * group + 100):
        walker = Sessions()
        walk(walker, seed, steps=300)
        effects += len(walker.archive) + sum(len(side.effects) for side in walker.side)
    assert effects > 2000, "the walks must get somewhere"


# --- single cases -------------------------------------------------------------------------------


def connected(window: int = 4) -> tuple[Channel, Channel]:
    """Return the two sides of a new session."""
    return Channel(window), Channel(window)


def pump(frames: Iterable[bytes], to: Channel) -> list[int]:
    """Deliver frames; return the numbers of the messages that came out."""
    deliveries = [to.receive(frame) for frame in frames]
    return [number_of(d) for d in deliveries if d is not None]


def test_numbers_acks_and_settling_out_of_order() -> None:
    a, b = connected()
    frames = [a.send(message(n)) for n in (1, 2, 3)]
    assert [decode(frame).seq for frame in frames] == [1, 2, 3]
    assert pump(frames, b) == [1, 2, 3]
    assert not b.settle(2)
    assert not b.settle(2)
    assert b.settled == 0
    assert b.settle(1)
    assert b.settled == 2
    assert a.receive(b.send(Ack())) == Delivery(Ack(), 0)
    assert a.unacked == 1
    assert b.settle(3)
    reply = b.send(Ready(1))
    assert decode(reply) == Frame(Ready(1), 1, 3)
    assert a.receive(reply) == Delivery(Ready(1), 1)
    assert a.unacked == 0


def test_settling_what_was_not_delivered_does_nothing() -> None:
    a, b = connected()
    assert not b.settle(1)
    assert pump([a.send(message(1))], b) == [1]
    assert b.settle(1)
    assert not b.settle(1)
    assert not b.settle(0)
    assert not b.settle(2)
    assert b.settled == 1


def test_a_gap_is_refused_and_changes_nothing() -> None:
    a, b = connected()
    first, second = a.send(message(1)), a.send(message(2))
    with pytest.raises(SequenceGap, match="reconnect") as caught:
        b.receive(second)
    assert caught.value.code == ErrorCode.SEQUENCE_GAP
    assert pump([first, second, first, second], b) == [1, 2]


def test_more_than_the_window_is_refused() -> None:
    a, b = Channel(3), Channel(2)
    frames = [a.send(message(n)) for n in (1, 2, 3)]
    assert a.full
    assert pump(frames[:2], b) == [1, 2]
    with pytest.raises(ProtocolError, match="2 messages") as caught:
        b.receive(frames[2])
    assert caught.value.code == ErrorCode.WINDOW_EXCEEDED
    assert b.settle(1)
    assert pump(frames[2:], b) == [3]


def test_an_ack_of_what_was_never_sent_is_refused() -> None:
    a, _ = connected()
    with pytest.raises(ProtocolError) as caught:
        a.receive(encode(Ack(), 0, 1))
    assert (caught.value.code, caught.value.field) == ("bad_frame", "ack")
    a.send(message(1))
    assert a.receive(encode(Ack(), 0, 1)) == Delivery(Ack(), 0)
    assert a.unacked == 0


def test_an_old_ack_changes_nothing() -> None:
    a, _ = connected()
    for number in (1, 2, 3):
        a.send(message(number))
    for ack, left in ((2, 1), (0, 1), (1, 1), (3, 0), (2, 0)):
        a.receive(encode(Ack(), 0, ack))
        assert a.unacked == left


def test_the_frame_limit_of_a_channel() -> None:
    channel = Channel(4, max_frame=1024)
    with pytest.raises(ProtocolError) as caught:
        channel.receive(encode(Decline(1, "x" * 1024), 1, 0))
    assert caught.value.code == ErrorCode.FRAME_TOO_BIG


def test_resume_sends_again_what_was_not_settled() -> None:
    a, b = connected()
    frames = [a.send(message(n)) for n in (1, 2, 3, 4)]
    assert pump(frames[:3], b) == [1, 2, 3]
    b.settle(1)
    again = a.resume(b.settled)
    assert [decode(frame).seq for frame in again] == [2, 3, 4]
    assert pump(again, b) == [4]


def test_cannot_resume_what_was_never_sent() -> None:
    a, _ = connected()
    a.send(message(1))
    with pytest.raises(CannotResume, match="only 1 were sent") as caught:
        a.resume(2)
    assert caught.value.code == ErrorCode.CANNOT_RESUME
    assert a.unacked == 1


def test_cannot_resume_when_the_peer_forgot() -> None:
    a, b = connected()
    old = to_disk(b.snapshot())
    pump([a.send(message(n)) for n in (1, 2)], b)
    b.settle(1)
    b.settle(2)
    a.receive(b.send(Ack()))
    b = Channel.restore(from_disk(old))
    with pytest.raises(CannotResume, match="forgotten"):
        a.resume(b.settled)
    assert a.resume(2) == []


def test_a_restart_delivers_what_was_not_settled_and_nothing_else() -> None:
    a, b = connected()
    frames = [a.send(message(n)) for n in (1, 2, 3, 4)]
    assert pump(frames, b) == [1, 2, 3, 4]
    b.settle(1)
    b.settle(3)
    b = Channel.restore(from_disk(to_disk(b.snapshot())), 4)
    assert b.settled == 1
    again = a.resume(b.settled)
    assert pump(again, b) == [2, 4]
    b.settle(2)
    assert b.settled == 3
    b.settle(4)
    assert b.settled == 4


def test_what_was_settled_before_a_restart_need_not_come_again() -> None:
    """Message 3 is settled before 2; after a restart 2 arrives, then the link breaks."""
    a, b = connected()
    pump([a.send(message(n)) for n in (1, 2, 3)], b)
    b.settle(1)
    b.settle(3)
    b = Channel.restore(from_disk(to_disk(b.snapshot())), 4)
    second, third = a.resume(b.settled)
    assert pump([second], b) == [2]
    b.settle(2)
    assert b.settled == 3
    assert a.resume(b.settled) == []
    assert pump([a.send(message(4)), third], b) == [4]


def test_a_snapshot_keeps_unsettled_messages_with_their_tensors() -> None:
    a, b = connected()
    for number in (1, 2):
        a.send(message(number))
    a.send(BlobGet("0" * 64, 0))
    saved = a.snapshot()
    a = Channel.restore(from_disk(to_disk(saved)), 4)
    assert to_disk(a.snapshot()) == to_disk(saved)
    assert a.unacked == 2
    frames = [*a.resume(0), a.send(message(3))]
    assert pump(frames, b) == [1, 2, 3]
