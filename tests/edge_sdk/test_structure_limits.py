"""Limits on the structure of a frame, checked on its bytes."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.frames import decode, encode, pack_tensors
from edge_sdk.protocol.messages import Update
from edge_sdk.protocol.structure import HELLO_VALUES, check_structure

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(width=64)
    | st.text(max_size=70)
    | st.binary(max_size=300)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=40))
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=40,
)


def count(value: Any) -> tuple[int, int]:
    """Number of values, and of containers inside each other."""
    if isinstance(value, dict):
        inner = [count(v) for pair in value.items() for v in pair]
    elif isinstance(value, list):
        inner = [count(v) for v in value]
    else:
        return 1, 0
    return 1 + sum(n for n, _ in inner), 1 + max((d for _, d in inner), default=0)


@given(values)
@settings(max_examples=300)
def test_values_and_levels_are_counted_as_in_the_objects(value: Any) -> None:
    data = msgpack.packb(value)
    number, depth = count(value)
    check_structure(data, number, depth)
    with pytest.raises(ProtocolError, match=f"more than {number - 1} values"):
        check_structure(data, number - 1, depth)
    if depth:
        with pytest.raises(ProtocolError, match=f"more than {depth - 1} levels"):
            check_structure(data, number, depth - 1)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_any_bytes_are_accepted_as_msgpack_accepts_them(data: bytes) -> None:
    try:
        msgpack.unpackb(data, strict_map_key=False, raw=True)
        valid = True
    except msgpack.exceptions.ExtraData:
        valid = False
    except (ValueError, TypeError, RecursionError):
        return  # also refused for what is in the values, which nobody has looked at here
    try:
        check_structure(data, 10**6, 10**6)
        accepted = True
    except ProtocolError:
        accepted = False
    assert accepted == valid


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_document_that_is_cut_off_is_refused(content: bytes, data: st.DataObject) -> None:
    whole = msgpack.packb(["update", 1, 0, {"content": content}])
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ProtocolError, match="cut off"):
        check_structure(whole[:cut])


@pytest.mark.parametrize("byte", [b"\x80", b"\x90", b"\xc0", b"\xa0"])
def test_small_values_cost_no_memory_before_they_are_refused(byte: bytes) -> None:
    body = b"".join(b"\xdc\x04\x00" + byte * 1024 for _ in range(1024))
    frame = b"\x94\xa5hello\x00\x00\xdc\x04\x00" + body
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ProtocolError, match="values"):
        decode(frame)
    assert time.process_time() - began < 1.0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    with pytest.raises(ProtocolError, match=f"more than {HELLO_VALUES} values"):
        decode(frame, max_values=HELLO_VALUES)


def test_the_largest_update_that_the_protocol_allows_is_taken() -> None:
    tensors = {f"block.{i}.weight": np.zeros(1, np.float32) for i in range(65_536)}
    update = Update(round=1, tensors=tensors, samples=1, metrics={"loss": 1.0}, done=True)
    assert len(decode(encode(update, 1, 0)).message.tensors) == 65_536  # type: ignore[attr-defined]
    assert pack_tensors(tensors)
