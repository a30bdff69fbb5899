"""Frames: one binary websocket message = one frame = msgpack array ``[type, seq, ack, body]``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.checks import MAX_INT, MAX_TENSORS
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Message, from_body
from edge_sdk.protocol.structure import MAX_VALUES, check_structure
from edge_sdk.protocol.tensors import TENSOR_EXT, Array, pack_tensor, unpack_tensor

DEFAULT_MAX_FRAME = 64 * 2**20
"""Default limit of a frame, in bytes."""


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        message: what it carries.
        seq: its number in the sender's sequence, 0 for unreliable messages.
        ack: every number up to this one that the sender received is settled.
    """

    message: Message
    seq: int
    ack: int


def encode(message: Message, seq: int, ack: int, agreed: Collection[str] = ()) -> bytes:
    """The bytes of a frame.

    Args:
        message: the message.
        seq: its number, 0 if it is unreliable.
        ack: see :class:`Frame`.
        agreed: the extensions that both sides speak.

    Raises:
        ProtocolError: the message, or a field of it, belongs to another extension.
    """
    packed: bytes = msgpack.packb([message.TYPE, seq, ack, message.body(agreed)], default=_pack)
    return packed


def kind_of(frame: bytes) -> str:
    """The message type of a frame that :func:`encode` made, without decoding it."""
    return frame[2 : 2 + (frame[1] & 0x1F)].decode()


def decode(
    data: bytes | str,
    max_frame: int = DEFAULT_MAX_FRAME,
    max_values: int = MAX_VALUES,
    agreed: Collection[str] = (),
) -> Frame:
    """Decode and validate one frame.

    Memory stays proportional to ``len(data)``, whatever lengths the peer claims. The structure is
    checked before any object is built.

    Args:
        data: the frame.
        max_frame: largest size, in bytes.
        max_values: largest number of msgpack values in the frame.
        agreed: the extensions that both sides speak; what belongs to another one is unknown.

    Raises:
        ProtocolError: text instead of binary, oversized, truncated or malformed frame, unknown
            message type, or a bad field.
    """
    if isinstance(data, str):
        raise ProtocolError(
            ErrorCode.BAD_FRAME, "frames are binary websocket messages, this one is text"
        )
    if len(data) > max_frame:
        raise ProtocolError(
            ErrorCode.FRAME_TOO_BIG,
            f"a frame of {len(data)} bytes is over the limit of {max_frame}",
        )
    check_structure(data, max_values)
    try:
        frame = msgpack.unpackb(
            data,
            ext_hook=_unpack,
            strict_map_key=True,
            max_array_len=1024,
            max_map_len=MAX_TENSORS,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"a frame of {len(data)} bytes is not valid msgpack: {error}"[:512]
        ) from error
    if not isinstance(frame, list) or len(frame) != 4:
        raise ProtocolError(ErrorCode.BAD_FRAME, "a frame is an array [type, seq, ack, body]")
    kind, seq, ack, body = frame
    for name, value in (("seq", seq), ("ack", ack)):
        if type(value) is not int or not 0 <= value <= MAX_INT:
            raise ProtocolError(ErrorCode.BAD_FRAME, f"{name} must be an integer from 0 on", name)
    message = from_body(kind, body, agreed)
    if message.RELIABLE == (seq == 0):
        rule = "from 1 on" if message.RELIABLE else "0"
        raise ProtocolError(
            ErrorCode.BAD_FRAME, f"the seq of {kind} must be {rule}, not {seq}", "seq"
        )
    return Frame(message, seq, ack)


def pack_tensors(tensors: dict[str, Array]) -> bytes:
    """A blob of named tensors (the ``state`` of a round): a msgpack map from name to tensor."""
    packed: bytes = msgpack.packb(tensors, default=_pack)
    return packed


def unpack_tensors(data: bytes) -> dict[str, Array]:
    """Inverse of :func:`pack_tensors`; raises :class:`ProtocolError` for anything else."""
    try:
        tensors = msgpack.unpackb(data, ext_hook=_unpack, max_array_len=0, max_map_len=MAX_TENSORS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(ErrorCode.BAD_TENSOR, "the blob is not a map of tensors") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in tensors.items()
    ):
        raise ProtocolError(ErrorCode.BAD_TENSOR, "the blob is not a map from name to tensor")
    return tensors


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return pack_tensor(value)
    raise TypeError(f"cannot send a {type(value).__name__}")


def _unpack(code: int, data: bytes) -> Any:
    if code != TENSOR_EXT:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"unknown msgpack extension type {code}")
    return unpack_tensor(data)
