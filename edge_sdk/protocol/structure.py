"""Limits on the structure of a frame, checked before any object is built from it.

An object costs far more memory than the byte of msgpack that it is made of: a map without entries
is one byte on the wire and 64 bytes in memory. So the number of values and their depth are limited,
and both are counted on the bytes.
"""

from __future__ import annotations

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.checks import MAX_TENSORS
from edge_sdk.protocol.enums import ErrorCode

MAX_VALUES = 2 * MAX_TENSORS + 256
"""Values in one frame: a map with the largest number of tensors, and everything beside it."""

HELLO_VALUES = 64
"""Values in the first frame of a connection."""

MAX_DEPTH = 4
"""Containers inside each other: the frame, its body, a field, and a map in it."""

_FIXED = {
    0xC0: 1, 0xC2: 1, 0xC3: 1,  # nil, false, true
    0xCA: 5, 0xCB: 9,  # float
    0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9,  # integers
    0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18,  # extension types of fixed size
}  # fmt: skip
"""Size in bytes of a value that has a fixed size, by its first byte."""

_SIZED = {
    0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0),  # binary
    0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1),  # extension types
    0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),  # text
}  # fmt: skip
"""Bytes of the size, and bytes between the size and the content, by the first byte."""

_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Bytes of the number of entries, and values per entry: arrays and maps, by the first byte."""


def check_structure(
    data: bytes | bytearray, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH
) -> None:
    """Check how many values a msgpack document has, and how deep they lie, without building them.

    Args:
        data: one msgpack value, with nothing behind it.
        max_values: largest number of values; a container counts as one, and so does each of its
            keys and entries.
        max_depth: largest number of containers inside each other.

    Raises:
        ProtocolError: there are too many values, they lie too deep, or ``data`` is no msgpack.
    """
    place, size, values = 0, len(data), 0
    left: list[int] = [1]  # values that are still to come, of each open container
    while left:
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        values += 1
        if values > max_values:
            raise ProtocolError(
                ErrorCode.BAD_FRAME, f"a frame has more than {max_values} values in it"
            )
        if place >= size:
            raise _truncated(size)
        first = data[place]
        entries = -1
        if first <= 0x7F or first >= 0xE0:
            place += 1
        elif first <= 0x8F:
            entries, place = 2 * (first & 0x0F), place + 1
        elif first <= 0x9F:
            entries, place = first & 0x0F, place + 1
        elif first <= 0xBF:
            place += 1 + (first & 0x1F)
        elif first in _FIXED:
            place += _FIXED[first]
        elif first in _SIZED:
            width, between = _SIZED[first]
            start = place + 1 + width
            place = start + between + int.from_bytes(data[place + 1 : start], "big")
        elif first in _CONTAINERS:
            width, each = _CONTAINERS[first]
            start = place + 1 + width
            entries = each * int.from_bytes(data[place + 1 : start], "big")
            place = start
        else:
            raise ProtocolError(ErrorCode.BAD_FRAME, "a frame has a byte that msgpack does not use")
        if place > size:
            raise _truncated(size)
        if entries >= 0:
            if len(left) > max_depth:
                raise ProtocolError(
                    ErrorCode.BAD_FRAME, f"a frame has more than {max_depth} levels in it"
                )
            left.append(entries)
    if place != size:
        raise ProtocolError(ErrorCode.BAD_FRAME, f"a frame has {size - place} bytes behind its end")


def _truncated(size: int) -> ProtocolError:
    return ProtocolError(ErrorCode.BAD_FRAME, f"a frame of {size} bytes is cut off")
