"""Tensors and frames: round trips, and bytes from a peer that are wrong."""

from __future__ import annotations

import dataclasses
import math
import random
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgpack
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol import frames as wire
from edge_sdk.protocol import messages
from edge_sdk.protocol.checks import MAX_INT, MAX_TEXT
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.evaluation import Evaluate, Evaluated
from edge_sdk.protocol.frames import Frame, pack_tensors, unpack_tensors
from edge_sdk.protocol.message import EXTENSIONS
from edge_sdk.protocol.messages import (
    MESSAGES,
    Ack,
    Activations,
    Answer,
    Blob,
    BlobGet,
    Bye,
    Decline,
    Error,
    FeatureGradient,
    Features,
    Gradient,
    Hello,
    Infer,
    Message,
    Move,
    Piece,
    Ready,
    Round,
    Stop,
    Update,
    Welcome,
)
from edge_sdk.protocol.release import Running
from edge_sdk.protocol.tensors import (
    DTYPES,
    MAX_DIMS,
    TENSOR_EXT,
    TensorSpec,
    check_tensors,
    pack_tensor,
    unpack_tensor,
)

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

T = TypeVar("T")

encode = partial(wire.encode, agreed=EXTENSIONS)
decode = partial(wire.decode, agreed=EXTENSIONS)
from_body = partial(messages.from_body, agreed=EXTENSIONS)

FLOAT = np.arange(6, dtype=np.float32).reshape(2, 3)
HASH = "0123456789abcdef" * 4

# --- strategies ---------------------------------------------------------------------------------

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
arrays = st.sampled_from(sorted(DTYPES)).flatmap(lambda name: hnp.arrays(DTYPES[name], shapes))
small_arrays = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: hnp.arrays(DTYPES[name], hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
)
names = st.text(max_size=20)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
parts = st.dictionaries(names, small_arrays, max_size=3)
numbers = st.dictionaries(
    names,
    st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1),
    max_size=4,
)
versions = st.integers(0, 1_000_000)
from_0 = st.integers(0, MAX_INT)
from_1 = st.integers(1, MAX_INT)
texts = st.text(max_size=100)
extensions = st.none() | st.lists(st.text(min_size=1, max_size=64), max_size=16, unique=True)
bases = st.none() | st.dictionaries(st.integers(0, 63).map(str), hashes, max_size=4)
base = st.integers(0, 63)

STRATEGIES: dict[type[Message], st.SearchStrategy[Message]] = {
    Hello: st.builds(
        Hello,
        versions,
        texts,
        st.none() | texts,
        st.none() | st.text(max_size=64),
        from_0,
        st.none() | from_1,
        extensions,
    ),
    Ready: st.builds(Ready, from_1, st.none() | texts, st.none() | from_1),
    Decline: st.builds(Decline, from_1, texts),
    BlobGet: st.builds(BlobGet, hashes, from_0),
    Activations: st.builds(
        Activations,
        from_1,
        from_0,
        parts,
        st.none() | small_arrays,
        base,
        st.booleans(),
        st.none() | small_arrays,
    ),
    FeatureGradient: st.builds(FeatureGradient, from_1, from_0, parts, from_1),
    Update: st.builds(Update, from_1, parts, st.booleans(), from_1, numbers),
    Infer: st.builds(Infer, from_1, parts, st.none() | texts, base, st.floats(0, 1)),
    Evaluated: st.builds(Evaluated, from_1, from_0, numbers),
    Running: st.builds(Running, st.none() | hashes, st.none() | hashes, st.none() | texts),
    Bye: st.builds(Bye, texts),
    Welcome: st.builds(
        Welcome,
        versions,
        texts,
        texts,
        st.text(max_size=64),
        st.booleans(),
        from_0,
        hashes,
        from_1,
        st.integers(1024, MAX_INT),
        st.none() | hashes,
        bases,
        extensions,
        st.none() | st.integers(1024, MAX_INT),
        st.none() | from_0,
    ),
    Blob: st.builds(Blob, hashes, from_0, from_0, st.binary(max_size=50)),
    Round: st.builds(
        Round,
        from_1,
        st.none() | hashes,
        from_1,
        from_1,
        numbers,
        st.sampled_from(["train", "forward", "returned", "u_shaped", "fused", "none"]),
        from_0,
        st.integers(0, 1024),
        bases,
    ),
    Features: st.builds(Features, from_1, from_0, parts),
    Gradient: st.builds(
        Gradient,
        from_1,
        from_0,
        parts,
        st.none() | st.floats(allow_nan=False, allow_infinity=False),
    ),
    Evaluate: st.builds(
        Evaluate,
        from_1,
        st.lists(names, max_size=3),
        st.floats(allow_nan=False, allow_infinity=False),
        st.none() | hashes,
        bases,
    ),
    Move: st.builds(Move, texts, hashes, texts),
    Stop: st.builds(Stop, texts, st.none() | hashes, bases),
    Answer: st.builds(Answer, from_1, st.lists(names, max_size=3), small_arrays),
    Error: st.builds(Error, st.text(max_size=64), texts, st.booleans(), st.none() | texts),
    Ack: st.builds(Ack),
    Piece: st.builds(Piece, st.binary(max_size=50), st.booleans()),
}
frames = st.one_of(*STRATEGIES.values()).flatmap(
    lambda message: st.builds(
        Frame, st.just(message), from_1 if message.RELIABLE else st.just(0), from_0
    )
)

GOOD: list[Message] = [
    Hello(1, "secret", "small", "s1", 7, 512, ["pieces"]),
    Ready(100, "small", 3),
    Decline(3, "battery low"),
    BlobGet(HASH, 0),
    Activations(1, 0, {"h": FLOAT}, np.array([1, 2]), 3, True, FLOAT),
    FeatureGradient(1, 0, {"h": FLOAT}, 2),
    Update(1, {"stem.weight": FLOAT}, True, 100, {"loss": 0.5}),
    Infer(1, {"h": FLOAT}, "small", 3, 0.5),
    Bye("done"),
    Welcome(
        1, "phone", "small", "s1", True, 3, HASH, 64, 2**26, HASH, {"1": HASH}, ["a"], 2**27, 7
    ),
    Blob(HASH, 0, 3, b"abc"),
    Round(1, HASH, 1, 32, {"lr": 0.05}, "returned", 0, 2, {"1": HASH}),
    Features(1, 0, {"h": FLOAT}),
    Gradient(1, 0, {"g": FLOAT}, 0.5),
    Evaluated(3, 117, {"ensemble": 0.5}),
    Running("0" * 64, "1" * 64, "it answers differently"),
    Evaluate(3, ["mix"], 30.0, HASH, {"1": HASH}),
    Move("large", HASH, "there is time for it"),
    Stop("finished", HASH, {"1": HASH}),
    Answer(1, ["head"], FLOAT),
    Error(ErrorCode.BAD_FRAME, "no", True, "seq"),
    Ack(),
    Piece(b"abc", True),
]
"""One valid message of each type, in which no field has its default value."""


def raw(message: Message) -> dict[str, Any]:
    """Return the body of a message, for a test to change."""
    return dict(message.body(EXTENSIONS))


def frame_bytes(kind: object, body: object, seq: object = 1, ack: object = 0) -> bytes:
    """Return a frame with any contents."""
    packed: bytes = msgpack.packb(
        [kind, seq, ack, body],
        default=lambda v: pack_tensor(v) if isinstance(v, np.ndarray) else None,
    )
    return packed


def same(a: Any, b: Any) -> bool:
    """Compare values, and arrays bit by bit, so that NaN equals itself."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


def same_message(a: Message, b: Message) -> bool:
    """Compare two messages, arrays included."""
    return type(a) is type(b) and all(
        same(getattr(a, f.name), getattr(b, f.name))
        for f in dataclasses.fields(a)  # type: ignore[arg-type]
    )


def refusal(data: bytes | str, **options: int) -> ProtocolError:
    """Return the error that decoding a frame raises."""
    with pytest.raises(ProtocolError) as caught:
        decode(data, **options)
    return caught.value


def attempt(parse: Callable[..., T], *args: Any) -> T | ProtocolError:
    """Return the result of a function, or the only error that it may raise."""
    try:
        return parse(*args)
    except ProtocolError as error:
        return error


# --- tensors ------------------------------------------------------------------------------------


@given(arrays)
def test_a_tensor_comes_back_as_it_was(array: np.ndarray) -> None:
    packed = pack_tensor(array)
    back = unpack_tensor(packed.data)
    assert packed.code == TENSOR_EXT
    assert same(back, array)
    assert not back.flags.writeable


@given(arrays, st.data())
def test_memory_layout_and_byte_order_do_not_travel(array: np.ndarray, data: st.DataObject) -> None:
    steps = st.sampled_from([slice(None), slice(None, None, -1), slice(None, None, 2)])
    view = array.T[tuple(data.draw(steps) for _ in array.shape)]
    if data.draw(st.booleans()):
        view = view.astype(view.dtype.newbyteorder(">"))
    back = unpack_tensor(pack_tensor(view).data)
    assert back.dtype == DTYPES[view.dtype.name]
    assert back.tobytes() == np.ascontiguousarray(view, back.dtype).tobytes()
    assert back.shape == view.shape


def test_a_decoded_tensor_shares_the_memory_of_its_bytes() -> None:
    data = pack_tensor(np.zeros(1000, np.float32)).data
    assert np.shares_memory(unpack_tensor(data), np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("dtype", ["bool", "float64", "uint16", "complex64", "U3", "O", "i4,i4"])
def test_other_dtypes_do_not_travel(dtype: str) -> None:
    with pytest.raises(ProtocolError, match="cannot travel") as caught:
        pack_tensor(np.zeros(1, dtype))
    assert caught.value.code == ErrorCode.BAD_TENSOR


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(["float64", [1], bytes(8)], id="unknown dtype"),
        pytest.param([b"int8", [1], bytes(1)], id="dtype not text"),
        pytest.param(["x" * 1000, [1], bytes(1)], id="long dtype"),
        pytest.param(["int8", 1, bytes(1)], id="shape not a list"),
        pytest.param(["int8", [-1], bytes(1)], id="negative"),
        pytest.param(["int8", [1.0], bytes(1)], id="float in shape"),
        pytest.param(["int8", [True], bytes(1)], id="bool in shape"),
        pytest.param(["int8", [1] * (MAX_DIMS + 1), bytes(1)], id="too many dimensions"),
        pytest.param(["int8", [2], bytes(1)], id="too few bytes"),
        pytest.param(["int8", [2], bytes(3)], id="too many bytes"),
        pytest.param(["float32", [2], bytes(2)], id="wrong item size"),
        pytest.param(["int8", [], b""], id="scalar without bytes"),
        pytest.param(["int8", [1]], id="two elements"),
        pytest.param(["int8", [1], bytes(1), 0], id="four elements"),
        pytest.param(["int8", [1], "a"], id="text for bytes"),
        pytest.param({"int8": [1]}, id="a map"),
        pytest.param(["int8", [2**63, 2**63], bytes(1)], id="claims 2**126"),
        pytest.param(["int8", [0, 2**64 - 1], b""], id="empty, but huge"),
        pytest.param(["int64", [0, 2**60], b""], id="empty, but the rest overflows"),
        pytest.param(["int8", [2**62, 0, 2**62], b""], id="empty in the middle"),
    ],
)
def test_bad_tensors(payload: object) -> None:
    data = msgpack.packb(payload)
    with pytest.raises(ProtocolError) as caught:
        unpack_tensor(data)
    assert caught.value.code == ErrorCode.BAD_TENSOR
    spoiled = frame_bytes("infer", {"request": 1, "parts": {"h": msgpack.ExtType(1, data)}})
    assert refusal(spoiled).code == ErrorCode.BAD_TENSOR


@given(st.binary(max_size=200))
def test_any_bytes_as_a_tensor(data: bytes) -> None:
    result = attempt(unpack_tensor, data)
    if isinstance(result, ProtocolError):
        assert result.code == ErrorCode.BAD_TENSOR
    else:
        assert result.nbytes <= len(data)


# --- checks of tensors --------------------------------------------------------------------------

SPECS = (TensorSpec("q", "int8", ("batch", 4)), TensorSpec("scale", "float32", ("batch",)))


def checked(tensors: dict[str, np.ndarray], **symbols: int) -> str | None:
    """Return the name of the wrong tensor, or None."""
    error = attempt(check_tensors, tensors, SPECS, symbols)
    if error is None:
        return None
    assert error.code == ErrorCode.BAD_TENSOR
    assert error.field is not None
    assert error.field in str(error)
    return error.field


def test_check_tensors_names_what_is_wrong() -> None:
    q, scale = np.zeros((2, 4), np.int8), np.zeros(2, np.float32)
    assert checked({"q": q, "scale": scale}) is None
    assert checked({"scale": scale, "q": q}, batch=2) is None
    assert checked({"q": q, "scale": scale}, batch=3) == "q"
    assert checked({"q": q}) == "scale"
    assert checked({"q": q, "scale": scale, "more": q}) == "more"
    assert checked({"q": q.astype(np.uint8), "scale": scale}) == "q"
    assert checked({"q": q[:, :3], "scale": scale}) == "q"
    assert checked({"q": q[0], "scale": scale}) == "q"
    assert checked({"q": q[:, :, None], "scale": scale}) == "q"
    assert checked({"q": q, "scale": np.zeros(3, np.float32)}) == "scale"
    assert checked({"q": q[:0], "scale": scale[:0]}) == "q", "a symbol is at least 1"


def test_a_symbol_gets_its_value_from_the_first_tensor() -> None:
    symbols: dict[str, int] = {}
    SPECS[0].check(np.zeros((5, 4), np.int8), symbols)
    assert symbols == {"batch": 5}
    with pytest.raises(ProtocolError, match="batch=5"):
        SPECS[1].check(np.zeros(6, np.float32), symbols)


@given(arrays)
def test_a_spec_knows_its_size(array: np.ndarray) -> None:
    spec = TensorSpec("a", array.dtype.name, tuple(array.shape))
    spec.check(array, {})
    assert spec.nbytes() == array.nbytes
    symbolic = TensorSpec("a", array.dtype.name, ("n", *array.shape))
    assert symbolic.nbytes(n=3) == 3 * array.nbytes


# --- frames -------------------------------------------------------------------------------------


def test_every_message_is_covered_here() -> None:
    assert set(STRATEGIES) == set(MESSAGES.values()) == {type(message) for message in GOOD}
    assert all(len(m.body(EXTENSIONS)) == len(dataclasses.fields(m)) for m in GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.TYPE)
@settings(max_examples=40)
@given(data=st.data())
def test_a_frame_comes_back_as_it_was(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(STRATEGIES[kind])
    seq = data.draw(from_1) if kind.RELIABLE else 0
    ack = data.draw(from_0)
    frame = decode(encode(message, seq, ack))
    assert (frame.seq, frame.ack) == (seq, ack)
    assert same_message(frame.message, message)
    assert same_message(from_body(kind.TYPE, message.body(EXTENSIONS)), message)


@given(order=st.permutations(range(12)))
def test_base_networks_come_in_the_order_in_which_they_were_sent(order: list[int]) -> None:
    stop = Stop("done", None, {str(base): HASH for base in order})
    back = decode(encode(stop, 1, 0)).message
    assert isinstance(back, Stop)
    assert back.bases is not None
    assert [int(base) for base in back.bases] == order


def test_defaults_are_left_out_and_may_be_sent() -> None:
    hello = Hello(1, "secret", "small")
    assert hello.body(EXTENSIONS).keys() == {"version", "token", "tier"}
    spelled = {**hello.body(EXTENSIONS), "session": None, "last_seq": 0}
    assert decode(frame_bytes("hello", spelled, 0)).message == hello


@pytest.mark.parametrize("message", GOOD, ids=lambda message: message.TYPE)
def test_missing_and_unknown_fields(message: Message) -> None:
    seq = int(message.RELIABLE)
    optional = {
        f.name
        for f in dataclasses.fields(message)  # type: ignore[arg-type]
        if f.default is not dataclasses.MISSING
    }
    body = raw(message)
    for name in body:
        short = {key: value for key, value in body.items() if key != name}
        if name in optional:
            assert isinstance(decode(frame_bytes(message.TYPE, short, seq)).message, type(message))
        else:
            error = refusal(frame_bytes(message.TYPE, short, seq))
            assert (error.code, error.field) == ("bad_message", name)
    for extra in ("nonsense", "Version", ""):
        error = refusal(frame_bytes(message.TYPE, {**body, extra: 1}, seq))
        assert (error.code, error.field) == ("bad_message", extra)


WRONG: dict[str, list[object]] = {
    "version": [-1, 1_000_001, 1.0, "1", True, None],
    "device": ["x" * 129, 5, None, b"phone"],
    "token": ["x" * 513, 5, None],
    "tier": ["x" * 129, 5],
    "session": ["x" * 65, 5],
    "last_seq": [-1, MAX_INT + 1, 1.5, None, False],
    "extensions": [
        "pieces",
        {"x": 1},
        [1],
        [b"x"],
        [""],
        ["x" * 65],
        ["x", "x"],
        [str(n) for n in range(17)],
    ],
    "from_round": [0, -1, 1.0, "1", True],
    "samples": [0, -1, 2.0, "9", None],
    "number": [0, -1, 1.0, None],
    "paths": ["mix", [1], ["x" * 513], None],
    "within_s": [math.inf, math.nan, "1", None],
    "results": [{"mix": math.nan}, {"mix": "1"}, [1.0], None],
    "round": [0, -1, MAX_INT + 1, True, None],
    "reason": ["x" * (MAX_TEXT + 1), 1, None],
    "hash": ["0" * 63, "0" * 65, "A" * 64, HASH + "\n", bytes(32), None],
    "offset": [-1, "0", None],
    "batch": [-1, 0.0, None],
    "parts": [None, [FLOAT], {"h": 1}, {"h": b"bytes"}, {"x" * 513: FLOAT}, {b"h": FLOAT}],
    "labels": [[1, 2], b"", "3", True],
    "loss": [math.nan, math.inf, "0", True],
    "tensors": [None, [], {"w": 0.5}],
    "done": [0, 1, None, "true", FLOAT],
    "last": [0, 1, "true"],
    "metrics": [
        None,
        {"loss": math.nan},
        {"loss": math.inf},
        {"loss": "0"},
        {"loss": True},
        {"x" * 513: 1.0},
        {str(i): 0.0 for i in range(65)},
    ],
    "request": [0, None],
    "resumed": [0, None],
    "manifest": ["0" * 10, None],
    "window": [0, -1, None],
    "max_frame": [1023, None],
    "max_message": [0, 1023, "1", 2**63],
    "size": [-1, None],
    "data": ["text", None, FLOAT],
    "state": ["0" * 63, 5, FLOAT],
    "epochs": [-1, None],
    "batch_size": [0, None],
    "hyper": [None, {"lr": math.nan}, {"lr": None}, FLOAT],
    "activations": ["all", "", None, 1, ["train"], FLOAT, np.array([1], np.int8)],
    "seed": [-1, None],
    "staleness": [-1, 1025, None, True],
    "memory_mb": [0, -1, 2.0, "512"],
    "refused": ["0" * 63, "G" * 64, 1],
    "release": [-1, 2.0, "1", True],
    "base": [-1, 64, 1.0, None, True],
    "bases": [
        [HASH],
        {"0": "0" * 63},
        {"0": None},
        {"x": HASH},
        {"64": HASH},
        {"00": HASH},
        {str(i): HASH for i in range(65)},
        HASH,
    ],
    "noise": [None, 0, 1, "true"],
    "present": [[1, 0], b"", 1, True],
    "robustness": [None, math.nan, math.inf, "1", True],
    "heads": [None, "head", [1], ["x" * 513], {"head": 1}],
    "logits": [None, [0.5], b""],
    "code": ["x" * 65, None],
    "message": ["x" * (MAX_TEXT + 1), None],
    "fatal": [None, 1],
    "field": ["x" * 513, 3],
}


@pytest.mark.parametrize("message", GOOD, ids=lambda message: message.TYPE)
def test_a_wrong_field_is_named(message: Message) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(message)}  # type: ignore[arg-type]
    for name in message.body(EXTENSIONS):
        wrong = [v for v in WRONG[name] if v is not None or defaults[name] is not None]
        assert wrong
        for value in wrong:
            data = frame_bytes(message.TYPE, {**raw(message), name: value}, int(message.RELIABLE))
            error = refusal(data)
            assert (error.code, error.field) == ("bad_message", name), value
            assert f"{message.TYPE}.{name}" in str(error)


def test_limits_are_inclusive() -> None:
    for body in (
        {"version": 1_000_000, "token": "t" * 512, "tier": "y" * 128},
        {"version": 0, "token": "", "tier": "", "session": "s" * 64},
    ):
        assert isinstance(decode(frame_bytes("hello", body, 0)).message, Hello)
    metrics = {"m" * 500 + str(i): i for i in range(64)}
    update = {
        **raw(next(m for m in GOOD if isinstance(m, Update))),
        "metrics": metrics,
        "round": MAX_INT,
    }
    assert decode(frame_bytes("update", update)).message.body(EXTENSIONS)["metrics"] == metrics
    answer = decode(
        frame_bytes(
            "answer", {**raw(next(m for m in GOOD if isinstance(m, Answer))), "heads": ["h"] * 1024}
        )
    ).message
    assert len(answer.body(EXTENSIONS)["heads"]) == 1024


@pytest.mark.parametrize(
    ("data", "code", "field"),
    [
        pytest.param("ready", "bad_frame", None, id="text"),
        pytest.param(b"", "bad_frame", None, id="empty"),
        pytest.param(msgpack.packb({"type": "ack"}), "bad_frame", None, id="map"),
        pytest.param(msgpack.packb(["ack", 0, 0]), "bad_frame", None, id="three"),
        pytest.param(msgpack.packb(["ack", 0, 0, {}, 0]), "bad_frame", None, id="five"),
        pytest.param(encode(Ack(), 0, 0) + b"\x00", "bad_frame", None, id="trailing byte"),
        pytest.param(frame_bytes("ack", {}, "0"), "bad_frame", "seq", id="seq text"),
        pytest.param(frame_bytes("ack", {}, -1), "bad_frame", "seq", id="seq negative"),
        pytest.param(frame_bytes("ack", {}, False), "bad_frame", "seq", id="seq bool"),
        pytest.param(frame_bytes("ack", {}, 2**63), "bad_frame", "seq", id="seq huge"),
        pytest.param(frame_bytes("ack", {}, 0, None), "bad_frame", "ack", id="ack nil"),
        pytest.param(frame_bytes("ack", {}, 0, 1.0), "bad_frame", "ack", id="ack float"),
        pytest.param(frame_bytes("nonsense", {}), "unknown_type", None, id="unknown type"),
        pytest.param(frame_bytes(b"ready", {}), "unknown_type", None, id="type as bytes"),
        pytest.param(frame_bytes(None, {}), "unknown_type", None, id="type nil"),
        pytest.param(frame_bytes(FLOAT, {}), "unknown_type", None, id="type tensor"),
        pytest.param(
            b"\x94" + b"\x91" * 1000 + b"\x00\x01\x00\x80", "bad_frame", None, id="type nested"
        ),
        pytest.param(frame_bytes("ready", []), "bad_message", None, id="body list"),
        pytest.param(frame_bytes("ready", None), "bad_message", None, id="body nil"),
        pytest.param(frame_bytes("ready", {1: 1}), "bad_frame", None, id="integer key"),
        pytest.param(
            frame_bytes("bye", {"reason": msgpack.ExtType(2, b"abc")}),
            "bad_frame",
            None,
            id="other extension type",
        ),
        pytest.param(
            frame_bytes("bye", {"reason": msgpack.Timestamp(1)}),
            "bad_message",
            "reason",
            id="timestamp",
        ),
        pytest.param(
            b"\x94\xa3bye\x01\x00\x81\xa6reason\xa1\xff", "bad_frame", None, id="not UTF-8"
        ),
        pytest.param(b"\x94\xa3bye\x01\x00\xc1", "bad_frame", None, id="reserved byte"),
        pytest.param(b"\x94" + b"\x91" * 100_000, "bad_frame", None, id="nested too deep"),
    ],
)
def test_bad_frames(data: bytes | str, code: str, field: str | None) -> None:
    error = refusal(data)
    assert (error.code, error.field) == (code, field)


@pytest.mark.parametrize("message", GOOD, ids=lambda message: message.TYPE)
def test_reliable_messages_have_a_seq_and_others_none(message: Message) -> None:
    for seq in (0, 1):
        data = encode(message, seq, 0)
        if message.RELIABLE == (seq > 0):
            assert decode(data).seq == seq
        else:
            error = refusal(data)
            assert (error.code, error.field) == ("bad_frame", "seq")


def test_a_frame_at_the_limit_and_one_over_it() -> None:
    data = encode(Blob(HASH, 0, 1000, bytes(1000)), 0, 0)
    assert decode(data, max_frame=len(data)).seq == 0
    assert refusal(data, max_frame=len(data) - 1).code == ErrorCode.FRAME_TOO_BIG


# --- arbitrary bytes ----------------------------------------------------------------------------

MSGPACK_CHUNKS = st.sampled_from(
    [
        *(encode(message, int(message.RELIABLE), 0) for message in GOOD),
        *(message.TYPE.encode() for message in GOOD),
        b"\x94",
        b"\xa5ready\x01\x00\x81\xa7samples",
        b"\xdd\x7f\xff\xff\xff",
        b"\xdf\x7f\xff\xff\xff",
        b"\xc6\x7f\xff\xff\xff",
        b"\xdb\x7f\xff\xff\xff",
        b"\xc9\x7f\xff\xff\xff\x01",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xc7\x04\x01\x93\xa4int8",
        b"\xd4\x01",
        b"\x81\xa1a",
        b"\x91",
        b"\xc0",
        b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    ]
)
junk = st.binary(max_size=200) | st.lists(MSGPACK_CHUNKS | st.binary(max_size=8), max_size=12).map(
    b"".join
)


def survives(data: bytes) -> None:
    """Check that decoding gives a ProtocolError, or a frame that can be encoded again."""
    result = attempt(decode, data)
    if isinstance(result, ProtocolError):
        assert result.code in {"bad_frame", "unknown_type", "bad_message", "bad_tensor"}
        assert len(str(result)) <= MAX_TEXT, "an error message must fit the error frame"
        assert result.field is None or len(result.field) <= 512
    else:
        again = decode(encode(result.message, result.seq, result.ack))
        assert same_message(again.message, result.message)


@settings(max_examples=400)
@given(junk)
def test_any_bytes_as_a_frame(data: bytes) -> None:
    survives(data)


@settings(max_examples=200)
@given(junk)
def test_any_bytes_as_named_tensors(data: bytes) -> None:
    result = attempt(unpack_tensors, data)
    if isinstance(result, ProtocolError):
        assert result.code in {"bad_frame", "bad_tensor"}
    else:
        assert same(unpack_tensors(pack_tensors(result)), result)


@settings(max_examples=300)
@given(frames, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_valid_frames_with_some_bytes_changed(frame: Frame, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encode(frame.message, frame.seq, frame.ack))
    for position, value in changes:
        data[position % len(data)] = value
    survives(bytes(data))


@pytest.mark.parametrize("message", GOOD, ids=lambda message: message.TYPE)
def test_every_byte_changed_and_every_truncation(message: Message) -> None:
    data = encode(message, int(message.RELIABLE), 0)
    rng = random.Random(1)
    for position in range(len(data)):
        changed = bytearray(data)
        for value in (0xC1, 0xDD, 0xFF, rng.randrange(256)):
            changed[position] = value
            survives(bytes(changed))
        assert refusal(data[:position]).code in ("bad_frame", "bad_tensor")


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts
    | st.binary(max_size=20) | small_arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
), st.sampled_from(GOOD), st.data())  # fmt: skip
def test_any_value_in_any_field(value: object, message: Message, data: st.DataObject) -> None:
    body = raw(message)
    assume(body)
    name = data.draw(st.sampled_from(sorted(body)))
    survives(frame_bytes(message.TYPE, {**body, name: value}, int(message.RELIABLE)))
    survives(frame_bytes(message.TYPE, value, int(message.RELIABLE)))
    survives(frame_bytes(value, body, int(message.RELIABLE)))


CLAIMS = {
    "array": b"\xdd\x80\x00\x00\x00",
    "map": b"\xdf\x80\x00\x00\x00",
    "bin": b"\xc6\x80\x00\x00\x00",
    "str": b"\xdb\x80\x00\x00\x00",
    "ext": b"\xc9\x80\x00\x00\x00\x01",
}
"""Headers that claim 2**31 elements or bytes."""


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claimed_length_takes_no_memory(claim: bytes) -> None:
    nested = claim * 200
    tail = bytes(64)
    around: list[bytes] = [
        claim,
        claim + tail,
        nested + tail,
        b"\x94\xa5ready\x01\x00" + claim + tail,
        b"\x94\xa5infer\x01\x00\x82\xa7request\x01\xa5parts" + claim + tail,
        b"\x94\xa5infer\x01\x00\x82\xa7request\x01\xa5parts\x81\xa1h\xc8\x00\x45\x01"
        + claim
        + tail,
    ]
    payloads = [claim, b"\x93" + claim, b"\x93\xa4int8" + claim, b"\x93\xa4int8\x91\x01" + claim]
    tracemalloc.start()
    try:
        for data in around:
            assert refusal(data).code in ("bad_frame", "bad_tensor")
            with pytest.raises(ProtocolError):
                unpack_tensors(data)
        for data in payloads:
            with pytest.raises(ProtocolError):
                unpack_tensor(data + tail)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("parse", [decode, unpack_tensors])
def test_nested_arrays_take_memory_in_proportion(parse: Any) -> None:
    """An array may claim one element per byte; hundreds of nested arrays must not multiply this."""
    length = 2**20
    data = (b"\xdd" + (length // 2).to_bytes(4, "big")) * 400
    data += bytes(length - len(data))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            parse(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * length


# --- named tensors ------------------------------------------------------------------------------


@given(st.dictionaries(names, arrays, max_size=4))
def test_named_tensors_come_back_as_they_were(tensors: dict[str, np.ndarray]) -> None:
    back = unpack_tensors(pack_tensors(tensors))
    assert list(back) == list(tensors)
    assert same(back, tensors)


@pytest.mark.parametrize(
    "value", [None, [], {"a": 1}, {"a": b""}, {"a": {}}, "a", {1: 2}, {b"a": 1}]
)
def test_other_values_are_not_named_tensors(value: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        unpack_tensors(msgpack.packb(value))
    assert caught.value.code == ErrorCode.BAD_TENSOR


def test_only_arrays_can_be_sent() -> None:
    with pytest.raises(TypeError, match="cannot send"):
        encode(Infer(1, {"h": object()}), 1, 0)  # type: ignore[dict-item]
