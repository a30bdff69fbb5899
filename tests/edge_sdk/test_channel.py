"""Exactly-once delivery: a model of all events on two sides and the network between them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.channel import CannotResume, Channel, Delivery, SequenceGap
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import Frame, decode, encode
from edge_sdk.protocol.messages import Ack, Activations, BlobGet, Decline, Ready
from edge_sdk.protocol.tensors import TENSOR_EXT, pack_tensor, unpack_tensor


def to_disk(saved: dict[str, Any]) -> bytes:
    """Return a snapshot as bytes."""
    packed: bytes = msgpack.packb(saved, default=pack_tensor)
    return packed


def from_disk(data: bytes) -> dict[str, Any]:
    """Inverse of :func:`to_disk`."""

    def hook(code: int, payload: bytes) -> Any:
        assert code == TENSOR_EXT
        return unpack_tensor(payload)

    saved: dict[str, Any] = msgpack.unpackb(data, ext_hook=hook)
    return saved


def message(number: int) -> Activations:
    """Return a message with tensors that differs from every other."""
    parts = {"h": np.full((2, 2), number, np.int32)}
    return Activations(round=number, batch=0, parts=parts, labels=np.array([number]))


def number_of(delivery: Delivery) -> int:
    """Return the number of a message made by :func:`message`; its tensors must be intact."""
    assert isinstance(delivery.message, Activations)
    number = delivery.message.round
    assert (delivery.message.parts["h"] == number).all()
    assert delivery.message.labels.tolist() == [number]
    return number


class Side:
    """One side of a session, and its state on disk.

    Effects and channel are written to disk together, and frames leave only after that. So the peer
    never knows more of this side than this side remembers after a restart.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.channel = Channel(window)
        self.sent: list[int] = []
        self.effects: list[int] = []
        self.pending: dict[int, int] = {}
        self.outbox: list[bytes] = []
        self.first_deliveries: list[int] = []
        self.disk = b""
        self.commit()

    def send(self, number: int) -> None:
        """Send the message ``number``."""
        self.outbox.append(self.channel.send(message(number)))
        self.sent.append(number)

    def take(self, delivery: Delivery | None) -> None:
        """Receive a delivery; its effect may come later."""
        if delivery is None or delivery.seq == 0:
            return
        number = number_of(delivery)
        assert number not in self.effects, "delivered again after its effect"
        assert number not in self.pending.values(), "delivered twice"
        assert delivery.seq not in self.pending
        self.pending[delivery.seq] = number
        if number not in self.first_deliveries:
            self.first_deliveries.append(number)

    def settle(self, seq: int) -> None:
        """Apply the effect of a pending message."""
        self.effects.append(self.pending.pop(seq))
        before = self.channel.settled
        assert self.channel.settle(seq) == (self.channel.settled > before)

    def commit(self) -> list[bytes]:
        """Write everything to disk; return the frames that may leave now."""
        saved = {
            "channel": self.channel.snapshot(), "sent": self.sent, "effects": self.effects,
        }  # fmt: skip
        self.disk = to_disk(saved)
        frames, self.outbox = self.outbox, []
        return frames

    def restart(self) -> None:
        """Lose everything that is not on disk."""
        saved = from_disk(self.disk)
        self.channel = Channel.restore(saved["channel"], self.window)
        self.sent, self.effects = saved["sent"], saved["effects"]
        self.pending, self.outbox = {}, []


class Sessions(RuleBasedStateMachine):
    """Two sides, a network that loses, repeats and reorders frames, and sides that restart."""

    sides = st.sampled_from([0, 1])

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.archive: list[int] = []
        self.network: list[tuple[int, bytes]] = []

    @initialize(window=st.integers(1, 5))
    def start(self, window: int) -> None:
        self.window = window
        self.side = [Side(window), Side(window)]

    # --- the sides ------------------------------------------------------------------------------

    @rule(at=sides, count=st.integers(1, 5), commit=st.booleans())
    def send(self, at: int, count: int, commit: bool) -> None:
        for _ in range(count):
            if not self.side[at].channel.full:
                self.numbers += 1
                self.side[at].send(self.numbers)
        if commit:
            self.flush(at)

    @rule(at=sides, message=st.sampled_from([Ack(), BlobGet("0" * 64, 0)]))
    def send_unreliable(self, at: int, message: Ack | BlobGet) -> None:
        side = self.side[at]
        before = side.channel.unacked
        side.outbox.append(side.channel.send(message))
        assert side.channel.unacked == before

    @rule(at=sides, which=st.lists(st.integers(0, 100), min_size=1, max_size=4), ack=st.booleans())
    def settle(self, at: int, which: list[int], ack: bool) -> None:
        side = self.side[at]
        for choice in which:
            if side.pending:
                side.settle(sorted(side.pending)[choice % len(side.pending)])
        if ack:
            side.outbox.append(side.channel.send(Ack()))
            self.flush(at)

    @rule(at=sides)
    def flush(self, at: int) -> None:
        self.network.extend((1 - at, frame) for frame in self.side[at].commit())

    @rule(at=sides)
    def restart(self, at: int) -> None:
        self.side[at].restart()

    @rule(dice=st.integers(0, 5))
    def restart_from_nothing(self, dice: int) -> None:
        """Restart a side without its session, which is rare; both sides begin a new session."""
        if dice:
            return
        self.archive += self.side[0].effects + self.side[1].effects
        self.network.clear()
        self.side = [Side(self.window), Side(self.window)]

    # --- the network ----------------------------------------------------------------------------

    def arrive(self, to: int, data: bytes) -> None:
        side = self.side[to]
        before = to_disk(side.channel.snapshot())
        received = side.channel._received
        if decode(data).seq <= received + 1:
            side.take(side.channel.receive(data))
            return
        with pytest.raises(SequenceGap) as caught:
            side.channel.receive(data)
        assert caught.value.code == ErrorCode.SEQUENCE_GAP
        assert to_disk(side.channel.snapshot()) == before, "a refused frame changed something"
        assert side.channel._received == received

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 1000), repeat=st.booleans())
    def deliver_any(self, which: int, repeat: bool) -> None:
        which %= len(self.network)
        to, data = self.network[which] if repeat else self.network.pop(which)
        self.arrive(to, data)

    @precondition(lambda self: self.network)
    @rule(count=st.integers(1, 8))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.network))):
            self.arrive(*self.network.pop(0))

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 1000), count=st.integers(1, 8))
    def lose(self, which: int, count: int) -> None:
        start = which % len(self.network)
        del self.network[start : start + count]

    @rule(late=st.booleans())
    def reconnect(self, late: bool) -> None:
        """Exchange what both sides have settled, and send the rest again.

        With ``late``, frames of the old connection may still arrive.
        """
        for at in (0, 1):
            self.flush(at)
        if not late:
            self.network.clear()
        settled = [side.channel.settled for side in self.side]
        for at in (0, 1):
            self.side[at].outbox.extend(self.side[at].channel.resume(settled[1 - at]))
            self.flush(at)

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def the_window_holds(self) -> None:
        for side in getattr(self, "side", []):
            assert side.channel.unacked <= self.window
            assert len(side.pending) <= self.window
            assert side.channel._received - side.channel.settled <= self.window
            assert side.channel.full == (side.channel.unacked == self.window)

    @invariant()
    def effects_happen_once_and_first_deliveries_in_order(self) -> None:
        side = getattr(self, "side", [])
        effects = self.archive + [number for one in side for number in one.effects]
        assert len(effects) == len(set(effects))
        for at, one in enumerate(side):
            first = one.first_deliveries
            assert first == side[1 - at].sent[: len(first)]
            assert set(one.effects) <= set(first)

    def teardown(self) -> None:
        """Everything arrives over one good connection."""
        if not hasattr(self, "side"):
            return
        self.reconnect(late=False)
        for at in (0, 1):
            while self.network:
                self.arrive(*self.network.pop(0))
            self.settle(at, [0] * self.window, ack=True)
            self.settle(1 - at, [0] * self.window, ack=True)
            while self.network:
                self.arrive(*self.network.pop(0))
            self.send(at, 1, commit=True)
        for _ in range(2):
            while self.network:
                self.arrive(*self.network.pop(0))
            for at in (0, 1):
                for seq in list(self.side[at].pending):
                    self.side[at].settle(seq)
                self.side[at].outbox.append(self.side[at].channel.send(Ack()))
                self.flush(at)
        while self.network:
            self.arrive(*self.network.pop(0))
        for at in (0, 1):
            here, there = self.side[at], self.side[1 - at]
            assert sorted(here.effects) == there.sent
            assert here.channel.settled == len(there.sent)
            assert there.channel.unacked == 0
        self.effects_happen_once_and_first_deliveries_in_order()


Sessions.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
test_exactly_once = Sessions.TestCase


def walk(seed: int, steps: int) -> Sessions:
    """Make a long random walk through the rules, most of which keep the traffic going."""
    rng = random.Random(seed)
    walker = Sessions()
    walker.start(window=rng.randint(1, 5))
    weights = {
        "send": 5.0, "settle": 8.0, "in order": 12.0, "any": 2.0, "lose": 0.5, "flush": 6.0,
        "reconnect": 2.0, "restart": 1.5, "from nothing": 0.02, "unreliable": 1.0,
    }  # fmt: skip
    for action in rng.choices(list(weights), list(weights.values()), k=steps):
        at = rng.randrange(2)
        if action == "send":
            walker.send(at=at, count=rng.randint(1, 4), commit=rng.random() < 0.7)
        elif action == "settle":
            which = rng.choices(range(100), k=rng.randint(1, 4))
            walker.settle(at=at, which=which, ack=rng.random() < 0.5)
        elif action == "in order" and walker.network:
            walker.deliver_in_order(count=rng.randint(1, 3))
        elif action == "any" and walker.network:
            walker.deliver_any(which=rng.randrange(1000), repeat=rng.random() < 0.5)
        elif action == "lose" and walker.network:
            walker.lose(which=rng.randrange(1000), count=rng.randint(1, 8))
        elif action == "flush":
            walker.flush(at=at)
        elif action == "reconnect":
            walker.reconnect(late=rng.random() < 0.3)
        elif action == "restart":
            walker.restart(at=at)
        elif action == "from nothing":
            walker.restart_from_nothing(dice=0)
        elif action == "unreliable":
            walker.send_unreliable(at=at, message=Ack())
        walker.the_window_holds()
        walker.effects_happen_once_and_first_deliveries_in_order()
    walker.teardown()
    return walker


@pytest.mark.parametrize("group", range(4))
def test_exactly_once_on_long_walks(group: int) -> None:
    effects = 0
    for seed in range(100 * group, 100 * group + 100):
        walker = walk(seed, steps=300)
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
