"""The extension ``pieces``: a long message travels as a series of short ones.

A piece is a reliable message with a number of its own. It is settled as soon as it has arrived, so
that after a break only the pieces under way are sent again. Short messages go between the pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

import msgpack
import numpy as np

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME, decode_message
from edge_sdk.protocol.messages import Answer, Infer, Message, Piece, class_of, from_body

PIECE = 64 * 1024
"""Bytes in every piece but the last. At 100 kB/s a question waits less than a second for a piece;
a header takes less than a thousandth of it."""

MAX_MESSAGE = 2 * DEFAULT_MAX_FRAME
"""Largest message in pieces that a device takes, and a hub by default, in bytes."""

OVERTAKING = (Infer, Answer)
"""Messages that may be sent before the rest of an earlier one: nothing depends on their order."""


def is_long(message: Message) -> bool:
    """Whether a message travels in pieces, by the bytes of its tensors."""
    return sum(map(_size, vars(message).values())) > PIECE


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return value.nbytes if isinstance(value, np.ndarray) else 0


class Waiting:
    """Messages that wait to be cut into pieces, and those that wait behind them. None is numbered.

    The first one may have been cut in part.
    """

    def __init__(self) -> None:
        self._messages: deque[Message | _Long] = deque()
        self._cut = 0
        self.bytes = 0
        """Bytes of long messages that are still to be sent."""

    def __len__(self) -> int:
        """Number of messages, with the one that has been cut in part."""
        return len(self._messages)

    def add(self, message: Message) -> None:
        """A short message waits until those before it have been sent."""
        self._messages.append(message)

    def add_long(self, kind: str, data: bytes) -> None:
        """A long message waits: its type, and its bytes ``[type, body]``."""
        self._messages.append(_Long(kind, data))
        self.bytes += len(data)

    def next(self) -> tuple[str, Message] | None:
        """The next message to number and send, a piece or a short one, and the type of the whole.

        None if nothing waits.
        """
        if not self._messages:
            return None
        first = self._messages[0]
        if isinstance(first, Message):
            self._messages.popleft()
            return first.TYPE, first
        data = first.data[self._cut : self._cut + PIECE]
        self._cut += len(data)
        self.bytes -= len(data)
        last = self._cut == len(first.data)
        if last:
            self._messages.popleft()
            self._cut = 0
        return first.kind, Piece(data=data, last=last)

    def snapshot(self, agreed: Collection[str]) -> dict[str, Any]:
        """What waits, for :meth:`restore`."""
        return {
            "cut": self._cut,
            "messages": [
                [m.TYPE, m.body(agreed)] if isinstance(m, Message) else [m.kind, m.data]
                for m in self._messages
            ],
        }

    def restore(self, saved: dict[str, Any], agreed: Collection[str]) -> None:
        """Wait as at :meth:`snapshot`."""
        for kind, content in saved["messages"]:
            if isinstance(content, bytes):
                self.add_long(kind, content)
            else:
                self.add(from_body(kind, content, agreed))
        self._cut = saved["cut"]
        self.bytes -= self._cut


class _Long:
    def __init__(self, kind: str, data: bytes) -> None:
        self.kind, self.data = kind, data


class Assembly:
    """The pieces of a message that has not arrived as a whole.

    Args:
        agreed: the extensions that both sides speak.
        limit: largest size of a message, in bytes.
    """

    def __init__(self, agreed: Collection[str], limit: int) -> None:
        self._agreed, self._limit = agreed, limit
        self.data = bytearray()
        """The bytes that are here."""
        self.kind = ""
        """Type of the message; empty while there is none."""

    def check(self, piece: Piece) -> None:
        """Check that a piece may come next; nothing changes.

        Raises:
            ProtocolError: it has another size than pieces have, the message is too large, or is of
                no type that may come in pieces.
        """
        if not 0 < len(piece.data) <= PIECE or (len(piece.data) < PIECE and not piece.last):
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"a piece of {len(piece.data)} bytes; every piece but the last has {PIECE}, and "
                "the last has no more",
                "data",
            )
        if len(self.data) + len(piece.data) > self._limit:
            raise ProtocolError(
                ErrorCode.FRAME_TOO_BIG, f"a message in pieces has more than {self._limit} bytes"
            )
        if not self.data:
            _kind(piece.data, self._agreed)

    def add(self, piece: Piece) -> Message | None:
        """Add a checked piece; returns the message if that is its last one.

        Raises:
            ProtocolError: the pieces are no valid message.
        """
        if not self.data:
            self.kind = _kind(piece.data, self._agreed)
        self.data += piece.data
        if not piece.last:
            return None
        data, self.data, self.kind = self.data, bytearray(), ""
        return decode_message(data, self._agreed)


def _kind(start: bytes, agreed: Collection[str]) -> str:
    """The type of a message in pieces, by its first piece."""
    unpacker = msgpack.Unpacker(max_str_len=64)
    unpacker.feed(start[:128])
    try:
        if unpacker.read_array_header() != 2:
            raise ValueError("not an array of two")
        kind = unpacker.unpack()
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, "a message in pieces is an array [type, body]"
        ) from error
    message = class_of(kind, agreed)
    if not message.RELIABLE or message is Piece:
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"{kind} does not travel in pieces")
    return message.TYPE
