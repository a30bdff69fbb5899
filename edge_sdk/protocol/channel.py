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
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME, Frame, decode, encode, encode_message
from edge_sdk.protocol.message import PIECES
from edge_sdk.protocol.messages import Message, Piece, from_body
from edge_sdk.protocol.pieces import MAX_MESSAGE, OVERTAKING, Assembly, Waiting, is_long


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
        max_message: limit of a message that is received in pieces, in bytes.
        peer_max_message: the peer's limit for the same, in bytes.
    """

    window: int = 64
    max_frame: int = DEFAULT_MAX_FRAME
    peer_max_frame: int = DEFAULT_MAX_FRAME
    extensions: frozenset[str] = frozenset()
    max_message: int = MAX_MESSAGE
    peer_max_message: int = MAX_MESSAGE
    settled: int = 0
    """Every received number up to this one is settled; travels as ``ack``."""
    _sent: int = 0
    _unacked: deque[tuple[int, Message]] = field(default_factory=deque)
    _received: int = 0
    _out_of_order: set[int] = field(default_factory=set)
    _whole: int = 0  # messages in _unacked; of one in pieces the last piece counts
    _waiting: Waiting = field(default_factory=Waiting)
    _assembly: Assembly = field(init=False)
    _unfinished: set[int] = field(default_factory=set)  # pieces above settled, without last ones
    _assembled: dict[int, Message] = field(default_factory=dict)  # not settled, by last piece

    def __post_init__(self) -> None:
        self._assembly = Assembly(self.extensions, self.max_message)

    @property
    def unacked(self) -> int:
        """Reliable messages that are not settled by the peer, whether or not all of it is sent."""
        return self._whole + len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the window is used up, so that the next reliable message has to wait."""
        return self.unacked >= self.window

    @property
    def waiting_bytes(self) -> int:
        """Bytes of long messages that :meth:`next` has still to cut."""
        return self._waiting.bytes

    @property
    def assembling(self) -> tuple[str, int]:
        """Type of the message that arrives in pieces now, and its bytes so far; ("", 0) if none."""
        return self._assembly.kind, len(self._assembly.data)

    def send(self, message: Message) -> bytes | None:
        """Keep a message until the peer settles it, and return its frame.

        None if it travels in pieces, or waits behind one that does: :meth:`next` gives its frames.

        Raises:
            ProtocolError: the message is over the peer's limit, or of an extension that the peer
                does not speak; nothing has changed.
        """
        if message.RELIABLE and PIECES in self.extensions:
            if is_long(message):
                self._send_long(message)
                return None
            if len(self._waiting) and not isinstance(message, OVERTAKING):
                encode(message, 0, 0, self.extensions)  # an error is for whoever sends it
                self._waiting.add(message)
                return None
        return self._number(message)

    def next(self) -> tuple[str, bytes] | None:
        """The next frame of the messages that wait, and the type of the message that it is of.

        Short messages that are sent meanwhile go between two pieces. None if nothing waits.
        """
        found = self._waiting.next()
        return None if found is None else (found[0], self._number(found[1]))

    def _send_long(self, message: Message) -> None:
        data = encode_message(message, self.extensions)
        if len(data) > self.peer_max_message:
            raise ProtocolError(
                ErrorCode.FRAME_TOO_BIG,
                f"{message.TYPE} has {len(data)} bytes, the peer takes {self.peer_max_message}; "
                "send fewer rows at a time, or raise the peer's max_message",
            )
        self._waiting.add_long(message.TYPE, data)

    def _number(self, message: Message) -> bytes:
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
            self._whole += not _is_unfinished(message)
        return frame

    def receive(self, data: bytes | str) -> Delivery | None:
        """Receive a frame; None if there is nothing to act on (an ack, a duplicate, or a piece).

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
        message = frame.message
        unfinished = len(self._unfinished) + _is_unfinished(message)
        if frame.seq > self._received and frame.seq - unfinished > self.settled + self.window:
            raise ProtocolError(
                ErrorCode.WINDOW_EXCEEDED,
                f"more than {self.window} messages are unsettled; wait for acknowledgements",
                "seq",
            )
        fresh = frame.seq > self._received and frame.seq not in self._out_of_order
        if fresh and isinstance(message, Piece) and frame.seq not in self._assembled:
            self._assembly.check(message)
        self._forget(frame.ack)
        if frame.seq == 0:
            return Delivery(message, 0)
        if frame.seq <= self._received:
            return None
        self._received = frame.seq
        if _is_unfinished(message):
            self._unfinished.add(frame.seq)
        if not fresh:
            return None  # settled before a restart
        return (
            self._assemble(frame.seq, message)
            if isinstance(message, Piece)
            else Delivery(message, frame.seq)
        )

    def _assemble(self, seq: int, piece: Piece) -> Delivery | None:
        """Take a piece; a delivery if the message is complete with it."""
        whole = self._assembled.get(seq)  # else delivered before a restart, and not settled
        if whole is None:
            whole = self._assembly.add(piece)
        if whole is None:
            self.settle(seq)  # its effect is that it is here
            return None
        self._assembled[seq] = whole
        return Delivery(whole, seq)

    def settle(self, seq: int) -> bool:
        """Say that the effect of a delivered message is complete; True if ``settled`` moved."""
        if not self.settled < seq <= self._received:
            return False
        self._out_of_order.add(seq)
        self._assembled.pop(seq, None)
        before = self.settled
        while self.settled + 1 in self._out_of_order:
            self.settled += 1
            self._out_of_order.remove(self.settled)
            self._unfinished.discard(self.settled)
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
            "waiting": self._waiting.snapshot(self.extensions),
            "assembly": [self._assembly.kind, bytes(self._assembly.data)],
            "assembled": [
                [seq, m.TYPE, m.body(self.extensions)] for seq, m in self._assembled.items()
            ],
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
        channel._whole = sum(not _is_unfinished(m) for _, m in channel._unacked)
        channel._waiting.restore(saved["waiting"], extensions)
        channel._assembly.kind, data = saved["assembly"]
        channel._assembly.data = bytearray(data)
        channel._assembled = {
            seq: from_body(kind, body, extensions) for seq, kind, body in saved["assembled"]
        }
        return channel

    def _forget(self, ack: int) -> None:
        while self._unacked and self._unacked[0][0] <= ack:
            _, message = self._unacked.popleft()
            self._whole -= not _is_unfinished(message)


def _is_unfinished(message: Message) -> bool:
    """Whether this is a piece that is not the last one. Such a piece does not count in the window:
    it is settled when it arrives."""
    return isinstance(message, Piece) and not message.last
