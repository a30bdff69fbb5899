"""Messages through shared memory arrive unchanged, whatever their arrays are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edge_sdk.protocol.tensors import Array, State
from server_hub.trunk.shared_memory import SharedMemoryPipe, StateReceiver, StateSender

SIZE = 4096
ARRAYS = arrays(
    st.sampled_from(["<f4", "<f2", "i1", "<i8", "bool"]), array_shapes(max_dims=3, max_side=40)
)


@dataclass(frozen=True)
class Message:
    """An object with arrays in it."""

    name: str
    parts: dict[str, Array]
    more: list[Array | None]


@contextmanager
def both_ends(size: int = SIZE) -> Iterator[tuple[SharedMemoryPipe, SharedMemoryPipe]]:
    """Return the two ends of a pipe."""
    ours, theirs = Pipe()
    first = SharedMemoryPipe(ours, size)
    second = SharedMemoryPipe(theirs, name=first.name)
    try:
        yield first, second
    finally:
        second.close()
        first.close()


def sent(message: Any, size: int = SIZE, copy: bool = True) -> Any:
    """Return a message as the other end receives it."""
    with both_ends(size) as (first, second):
        thread = threading.Thread(target=first.send, args=(message,))
        thread.start()
        found = second.receive(copy)
        thread.join()
        if not copy:
            found = _copied(found)  # views of the block would keep it mapped
        return found


def _copied(message: Message) -> Message:
    parts = {name: array.copy() for name, array in message.parts.items()}
    return Message(message.name, parts, [m if m is None else m.copy() for m in message.more])


def assert_same(got: Message, want: Message) -> None:
    """Check that values are equal bit for bit, with the same dtypes and shapes."""
    assert (got.name, list(got.parts)) == (want.name, list(want.parts))
    pairs = [*zip(got.parts.values(), want.parts.values(), strict=True)]
    pairs += zip(got.more, want.more, strict=True)  # type: ignore[arg-type]
    for one, other in pairs:
        assert (one is None) == (other is None)
        if other is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.dictionaries(st.text(max_size=5), ARRAYS, max_size=4),
    more=st.lists(st.none() | ARRAYS, max_size=4),
    size=st.sampled_from([64, 100, 4096, 2**20]),
    copy=st.booleans(),
)
def test_a_message_arrives_as_it_was_sent(
    parts: dict[str, Array], more: list[Array | None], size: int, copy: bool
) -> None:
    """This includes messages with arrays larger than the block, and messages without arrays."""
    message = Message("a message", parts, more)
    assert_same(sent(message, size, copy), message)


def test_arrays_that_are_not_contiguous_arrive() -> None:
    x = np.arange(240, dtype=np.float32).reshape(4, 60)[:, ::3]
    message = Message("", {"x": x, "scalar": np.float32(3.5).reshape(())}, [x.T])
    assert_same(sent(message), message)


def test_without_a_copy_arrays_lie_in_the_block() -> None:
    """The next message overwrites them; callers must know this."""
    with both_ends() as (first, second):
        first.send([np.zeros(8)])
        (view,) = second.receive(copy=False)
        (kept,) = [view.copy()]
        first.send([np.ones(8)])
        second.receive(copy=True)
        np.testing.assert_array_equal(kept, 0)
        np.testing.assert_array_equal(view, 1)
        del view


def test_the_end_that_made_the_block_removes_it() -> None:
    with both_ends() as (first, second):
        path = Path("/dev/shm") / first.name
        assert path.exists()
        second.close()
        assert path.exists(), "the other end does not remove it"
    assert not path.exists()


def test_the_other_end_is_gone() -> None:
    ours, theirs = Pipe()
    pipe = SharedMemoryPipe(ours, SIZE)
    theirs.close()
    with pytest.raises((EOFError, OSError)):
        pipe.receive(copy=True)
    pipe.close()


# --- states ---------------------------------------------------------------------------------------


def test_only_what_has_changed_is_sent() -> None:
    sender, receiver = StateSender(), StateReceiver()
    state: State = {name: np.full(3, i, np.float32) for i, name in enumerate("abc")}
    first = sender.delta({0: state})
    assert len(first.new) == 3
    receiver.states(first)
    again = sender.delta({1: dict(state), 2: dict(state)})
    assert again.new == {}
    found = receiver.states(again)
    assert found[1] is found[2], "states with the same tensors are one object"
    changed = {**state, "b": np.full(3, 7, np.float32)}
    delta = sender.delta({0: changed})
    assert len(delta.new) == 1
    np.testing.assert_array_equal(receiver.states(delta)[0]["b"], 7)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_row_of_states_is_put_together_again(data: st.DataObject) -> None:
    """Training and answers alternate; tensors change, return, and disappear."""
    sender, receiver = StateSender(), StateReceiver()
    pool = [np.full(2, i, np.float32) for i in range(6)]
    names = ["a", "b", "c"]
    for _ in range(data.draw(st.integers(1, 8))):
        wanted = {
            key: {
                name: pool[data.draw(st.integers(0, 5))]
                for name in data.draw(st.sets(st.sampled_from(names), min_size=1))
            }
            for key in data.draw(st.sets(st.integers(0, 2), min_size=1))
        }
        if data.draw(st.booleans()):  # new arrays in place of old ones
            pool[data.draw(st.integers(0, 5))] = np.full(2, data.draw(st.integers(9, 99)), "f4")
        found = receiver.states(sender.delta(wanted))
        assert found.keys() == wanted.keys()
        for key, state in wanted.items():
            assert found[key].keys() == state.keys()
            for name, tensor in state.items():
                np.testing.assert_array_equal(found[key][name], tensor)


def test_tensors_that_are_not_needed_any_more_are_forgotten() -> None:
    sender, receiver = StateSender(), StateReceiver()
    forgotten = 0
    for number in range(5):
        delta = sender.delta({0: {"a": np.full(3, number)}})
        forgotten += len(delta.forget)
        receiver.states(delta)
    assert forgotten == 3, "the last two are kept"
