"""Two sides of a session and the network between them: a model of everything that may happen."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from edge_sdk.protocol.channel import Channel, Delivery, SequenceGap
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode
from edge_sdk.protocol.messages import Ack, Activations, BlobGet, Message
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


def message(number: int, size: int = 4) -> Activations:
    """Return a message with a tensor of ``size`` elements that differs from every other."""
    parts = {"h": np.full((1, size), number, np.int32)}
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

    def __init__(self, window: int, agreed: frozenset[str]) -> None:
        self.window = window
        self.channel = Channel(window, extensions=agreed)
        self.received = 0
        """Largest number that was received, since the last restart."""
        self.sent: list[int] = []
        self.effects: list[int] = []
        self.pending: dict[int, int] = {}
        self.outbox: list[bytes] = []
        self.first_deliveries: list[int] = []
        self.disk = b""
        self.commit()

    def send(self, sent: Message) -> None:
        """Send a message; what travels in pieces waits for :meth:`cut`."""
        frame = self.channel.send(sent)
        if frame is not None:
            self.outbox.append(frame)

    def cut(self, count: int) -> None:
        """Cut pieces of what waits."""
        for _ in range(count):
            if (piece := self.channel.next()) is not None:
                self.outbox.append(piece[1])

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
        self.received = max(self.received, self.channel.settled)

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
        self.received = self.channel.settled


class Sessions(RuleBasedStateMachine):
    """Two sides, a network that loses, repeats and reorders frames, and sides that restart."""

    sides = st.sampled_from([0, 1])
    agreed: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.archive: list[int] = []
        self.network: list[tuple[int, bytes]] = []

    @initialize(window=st.integers(1, 5))
    def start(self, window: int) -> None:
        self.window = window
        self.side = [Side(window, self.agreed), Side(window, self.agreed)]

    # --- the sides ------------------------------------------------------------------------------

    @rule(
        at=sides,
        count=st.integers(1, 5),
        commit=st.booleans(),
        size=st.sampled_from([4, 4, 30, 99]),
    )
    def send(self, at: int, count: int, commit: bool, size: int = 4) -> None:
        for _ in range(count):
            if not self.side[at].channel.full:
                self.numbers += 1
                self.side[at].send(message(self.numbers, size))
                self.side[at].sent.append(self.numbers)
        if commit:
            self.flush(at)

    @rule(at=sides, count=st.integers(1, 9))
    def cut(self, at: int, count: int) -> None:
        self.side[at].cut(count)

    @rule(at=sides, message=st.sampled_from([Ack(), BlobGet("0" * 64, 0)]))
    def send_unreliable(self, at: int, message: Ack | BlobGet) -> None:
        side = self.side[at]
        before = side.channel.unacked
        side.send(message)
        assert side.channel.unacked == before

    @rule(at=sides, which=st.lists(st.integers(0, 100), min_size=1, max_size=4), ack=st.booleans())
    def settle(self, at: int, which: list[int], ack: bool) -> None:
        side = self.side[at]
        for choice in which:
            if side.pending:
                side.settle(sorted(side.pending)[choice % len(side.pending)])
        if ack:
            side.send(Ack())
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
        self.side = [Side(self.window, self.agreed), Side(self.window, self.agreed)]

    # --- the network ----------------------------------------------------------------------------

    def arrive(self, to: int, data: bytes) -> None:
        side = self.side[to]
        before = to_disk(side.channel.snapshot())
        seq = decode(data, agreed=self.agreed).seq
        if seq <= side.received + 1:
            side.take(side.channel.receive(data))
            side.received = max(side.received, seq)
            return
        with pytest.raises(SequenceGap) as caught:
            side.channel.receive(data)
        assert caught.value.code == ErrorCode.SEQUENCE_GAP
        assert to_disk(side.channel.snapshot()) == before, "a refused frame changed something"

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
            assert side.channel.full == (side.channel.unacked == self.window)
            if not self.agreed:
                assert side.received - side.channel.settled <= self.window

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
            for side in (0, 1):
                self.cut(side, 10**4)
                self.flush(side)
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
                self.side[at].send(Ack())
                self.flush(at)
        while self.network:
            self.arrive(*self.network.pop(0))
        for at in (0, 1):
            here, there = self.side[at], self.side[1 - at]
            assert sorted(here.effects) == there.sent
            assert there.channel.unacked == 0
            assert here.channel.assembling == ("", 0)
            if not self.agreed:
                assert here.channel.settled == len(there.sent)
        self.effects_happen_once_and_first_deliveries_in_order()


def walk(walker: Sessions, seed: int, steps: int) -> None:
    """Make a long random walk through the rules, most of which keep the traffic going."""
    rng = random.Random(seed)
    walker.start(window=rng.randint(1, 5))
    weights = {
        "send": 5.0, "settle": 8.0, "in order": 12.0, "any": 2.0, "lose": 0.5, "flush": 6.0,
        "reconnect": 2.0, "cut": 8.0 if walker.agreed else 0.0, "restart": 1.5,
        "from nothing": 0.02, "unreliable": 1.0,
    }  # fmt: skip
    for action in rng.choices(list(weights), list(weights.values()), k=steps):
        at = rng.randrange(2)
        if action == "send":
            size = rng.choice([4, 4, 30, 99]) if walker.agreed else 4
            walker.send(at=at, count=rng.randint(1, 4), commit=rng.random() < 0.7, size=size)
        elif action == "cut":
            walker.cut(at=at, count=rng.randint(1, 9))
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
