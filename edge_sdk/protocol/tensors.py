"""Tensors on the wire: msgpack extension type 1, ``[dtype, shape, raw little-endian bytes]``."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode

Array = npt.NDArray[Any]

State = dict[str, Array]
"""Tensors by full name, like ``block.3.conv.weight``."""

TENSOR_EXT = 1
"""The msgpack extension type of a tensor."""

MAX_DIMS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
"""The dtypes that may travel, by the name they have on the wire and in manifests."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_BIN_HEADERS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Wire name of a numpy dtype. Raises :class:`ProtocolError` for one that may not travel."""
    # numpy makes the name anew each time; big-endian arrays are found by theirs
    name = _NAMES.get(dtype) or dtype.name
    if name not in DTYPES:
        raise ProtocolError(
            ErrorCode.BAD_TENSOR, f"dtype {dtype} cannot travel; use {', '.join(DTYPES)}"
        )
    return name


def pack_tensor(array: Array) -> msgpack.ExtType:
    """Encode an array as the extension type that :func:`unpack_tensor` reads."""
    name = dtype_name(array.dtype)
    raw = np.ascontiguousarray(array, DTYPES[name]).tobytes()
    return msgpack.ExtType(TENSOR_EXT, msgpack.packb([name, list(array.shape), raw]))


def unpack_tensor(data: bytes) -> Array:
    """Decode the payload of extension type 1 into a read-only array that shares its memory.

    The length of the data decides how much is read, never the shape that the peer claims.

    Raises:
        ProtocolError: malformed payload, unknown dtype, or a shape that does not match the bytes.
    """
    header = msgpack.Unpacker(max_array_len=MAX_DIMS, max_str_len=16)
    header.feed(data[:128])
    try:
        if header.read_array_header() != 3:
            raise ValueError("not an array of three")
        name, shape = header.unpack(), header.unpack()
        start = header.tell()
        marker = data[start]
        size_format = _BIN_HEADERS[marker]
        (size,) = struct.unpack_from(size_format, data, start + 1)
        start += 1 + struct.calcsize(size_format)
    except (ValueError, KeyError, IndexError, struct.error, msgpack.UnpackException) as error:
        raise ProtocolError(
            ErrorCode.BAD_TENSOR, "a tensor is not [dtype, shape, bytes]; see docs/protocol.md"
        ) from error
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ProtocolError(ErrorCode.BAD_TENSOR, f"unknown tensor dtype {str(name)[:32]!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(
            ErrorCode.BAD_TENSOR, "a tensor shape is a list of integers, none negative"
        )
    if len(data) - start != size or math.prod(shape) * dtype.itemsize != size:
        raise ProtocolError(
            ErrorCode.BAD_TENSOR,
            f"a {name} tensor of shape {shape} has {math.prod(shape) * dtype.itemsize} bytes, "
            f"but {len(data) - start} came",
        )
    try:
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
    except ValueError as error:  # no elements, and the other dimensions beyond what numpy can hold
        raise ProtocolError(
            ErrorCode.BAD_TENSOR, f"a tensor cannot have the shape {shape}"
        ) from error


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must be: name, dtype and shape.

    A dimension is a number or a symbol such as ``"batch"``; one symbol has one value in one
    message.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def check(self, array: Array, symbols: dict[str, int]) -> None:
        """Raise :class:`ProtocolError` naming this tensor unless ``array`` is what it must be.

        Args:
            array: the tensor to check.
            symbols: values of the symbols met so far in this message; new ones are added.
        """
        if (_NAMES.get(array.dtype) or array.dtype.name) != self.dtype:
            raise ProtocolError(
                ErrorCode.BAD_TENSOR,
                f"{self.name} is {array.dtype.name}, must be {self.dtype}",
                self.name,
            )
        fits = len(array.shape) == len(self.shape)
        for size, want in zip(array.shape, self.shape, strict=False):
            if isinstance(want, str):
                fits = fits and size > 0 and symbols.setdefault(want, size) == size
            else:
                fits = fits and size == want
        if not fits:
            known = ", ".join(f"{name}={size}" for name, size in symbols.items())
            raise ProtocolError(
                ErrorCode.BAD_TENSOR,
                f"{self.name} has shape {list(array.shape)}, must be {list(self.shape)}"
                + (f" with {known}" if known else ""),
                self.name,
            )

    def nbytes(self, **symbols: int) -> int:
        """Size in bytes once every symbol has a value."""
        sizes = (symbols[n] if isinstance(n, str) else n for n in self.shape)
        return math.prod(sizes) * DTYPES[self.dtype].itemsize


def check_tensors(
    tensors: dict[str, Array],
    specs: tuple[TensorSpec, ...],
    symbols: dict[str, int],
) -> None:
    """Check that ``tensors`` are exactly the ones in ``specs``; errors name the tensor."""
    wanted = {spec.name: spec for spec in specs}
    for name in tensors:
        if name not in wanted:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"unexpected tensor {name!r}", name)
    for name, spec in wanted.items():
        if name not in tensors:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"tensor {name!r} is missing", name)
        spec.check(tensors[name], symbols)
