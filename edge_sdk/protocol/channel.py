"""Exactly-once delivery over a link that breaks: a state machine without I/O.

Both sides of a session hold a :class:`Channel`. Reliable messages are numbered from 1; a number
is acknowledged once the receiver has *settled* the message, that is, once its effect is complete
(and, on a hub that keeps a journal, on disk). After a break both sides say which number they have
settled (``hello.last_seq`` and ``welcome.last_seq``), the rest is sent again, and what was already
delivered is recognised and dropped.

The number of unsettled messages is the window. A sender that is at the window waits, so a slow
receiver slows the sender down and neither side's memory grows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME, Frame, decode, encode
from edge_sdk.protocol.messages import Message, from_body


class SequenceGap(ProtocolError):
    """A frame arrived without its predecessor. The session can go on over another connection."""


class CannotResume(ProtocolError):
    """The two sides disagree about what was settled. Only a new session helps."""


@dataclass(frozen=True)
class Delivery:
    """A message to act on. Reliable ones (``seq`` > 0) are settled with :meth:`Channel.settle`."""

    message: Message
    seq: int


@dataclass
class Channel:
    """One side of a session.

    Args:
        window: how many messages each side may leave unsettled.
        max_frame: limit of a received frame, in bytes.
        peer_max_frame: the peer's limit for the frames that this side sends, in bytes.
        extensions: the extensions that both sides have agreed on. Nothing of another one is sent,
            and what comes of another one is unknown.
    """

    window: int = 64
    max_frame: int = DEFAULT_MAX_FRAME
    peer_max_frame: int = DEFAULT_MAX_FRAME
    extensions: frozenset[str] = frozenset()
    settled: int = 0
    """Every received number up to this one is settled; travels as ``ack``."""
    _sent: int = 0
    _unacked: deque[tuple[int, Message]] = field(default_factory=deque)
    _received: int = 0
    _out_of_order: set[int] = field(default_factory=set)

    @property
    def unacked(self) -> int:
        """Reliable messages that were sent and not settled by the peer."""
        return len(self._unacked)

    @property
    def full(self) -> bool:
        """Whether the window is used up, so that the next reliable message has to wait."""
        return len(self._unacked) >= self.window

    def send(self, message: Message) -> bytes:
        """Number a message, keep it until the peer settles it, and return its frame.

        Raises:
            ProtocolError: the frame is over the peer's limit, or of an extension that the peer does
                not speak; nothing has changed.
        """
        seq = self._sent + 1 if message.RELIABLE else 0
        frame = encode(message, seq, self.settled, self.extensions)
        if len(frame) > self.peer_max_frame:
            raise ProtocolError(
                ErrorCode.FRAME_TOO_BIG,
                f"a frame with {message.TYPE} has {len(frame)} bytes, the peer takes "
                f"{self.peer_max_frame}; send fewer rows at a time, or raise the peer's max_frame",
            )
        if message.RELIABLE:
            self._sent = seq
            self._unacked.append((seq, message))
        return frame

    def receive(self, data: bytes | str) -> Delivery | None:
        """Receive a frame; None if there is nothing to act on (an ack, or a duplicate).

        Raises:
            SequenceGap: a predecessor is missing; nothing has changed, the frame is not kept.
            ProtocolError: the frame is invalid, acknowledges a frame never sent, or exceeds the
                window.
        """
        return self.accept(self.decode(data))

    def decode(self, data: bytes | str) -> Frame:
        """Decode a frame; nothing changes. Raises :class:`ProtocolError` if it is invalid."""
        return decode(data, self.max_frame, agreed=self.extensions)

    def accept(self, frame: Frame) -> Delivery | None:
        """:meth:`receive` for a frame that is already decoded."""
        if frame.ack > self._sent:
            raise ProtocolError(
                ErrorCode.BAD_FRAME, f"ack {frame.ack} is for a frame that was never sent", "ack"
            )
        if frame.seq > self._received + 1:
            raise SequenceGap(
                ErrorCode.SEQUENCE_GAP,
                f"frame {frame.seq} came after {self._received}; reconnect and resume",
                "seq",
            )
        if frame.seq > self.settled + self.window:
            raise ProtocolError(
                ErrorCode.WINDOW_EXCEEDED,
                f"more than {self.window} messages are unsettled; wait for acknowledgements",
                "seq",
            )
        self._forget(frame.ack)
        if frame.seq == 0:
            return Delivery(frame.message, 0)
        if frame.seq <= self._received:
            return None
        self._received = frame.seq
        if frame.seq in self._out_of_order:
            return None  # settled before a restart
        return Delivery(frame.message, frame.seq)

    def settle(self, seq: int) -> bool:
        """Say that the effect of a delivered message is complete; True if ``settled`` moved."""
        if not self.settled < seq <= self._received:
            return False
        self._out_of_order.add(seq)
        before = self.settled
        while self.settled + 1 in self._out_of_order:
            self.settled += 1
            self._out_of_order.remove(self.settled)
        # What was settled before a restart need not come again: the peer may forget it now.
        self._received = max(self._received, self.settled)
        return self.settled > before

    def resume(self, last_seq: int) -> list[bytes]:
        """After a reconnect: the peer settled up to ``last_seq``; the frames to send again.

        Raises:
            CannotResume: the peer has settled what was never sent, or lost what it had settled.
        """
        if last_seq > self._sent:
            raise CannotResume(
                ErrorCode.CANNOT_RESUME, f"the peer settled {last_seq}, only {self._sent} were sent"
            )
        if last_seq < self._sent - len(self._unacked):
            raise CannotResume(
                ErrorCode.CANNOT_RESUME,
                f"the peer settled only {last_seq}, frames up to "
                f"{self._sent - len(self._unacked)} are already forgotten",
            )
        self._forget(last_seq)
        return [encode(m, seq, self.settled, self.extensions) for seq, m in self._unacked]

    def snapshot(self) -> dict[str, Any]:
        """What must be on disk for the session to survive a restart of this side.

        Taken together with the effects of what was settled, delivery stays exactly once across
        the restart. A message that was delivered and not settled is delivered again.
        It must be on disk before a frame leaves that says any of it (a new number, a larger ack):
        the peer must never know more of this side than this side does after a restart.
        """
        return {
            "extensions": sorted(self.extensions),
            "settled": self.settled,
            "out_of_order": sorted(self._out_of_order),
            "sent": self._sent,
            "unacked": [[seq, m.TYPE, m.body(self.extensions)] for seq, m in self._unacked],
        }

    @classmethod
    def restore(
        cls, saved: dict[str, Any], window: int = 64, max_frame: int = DEFAULT_MAX_FRAME
    ) -> Channel:
        """A channel as it was at :meth:`snapshot`."""
        extensions = frozenset(saved["extensions"])
        channel = cls(window, max_frame, extensions=extensions, settled=saved["settled"])
        channel._received = saved["settled"]
        channel._out_of_order.update(saved["out_of_order"])
        channel._sent = saved["sent"]
        channel._unacked.extend(
            (seq, from_body(kind, body, extensions)) for seq, kind, body in saved["unacked"]
        )
        return channel

    def _forget(self, ack: int) -> None:
        while self._unacked and self._unacked[0][0] <= ack:
            self._unacked.popleft()
