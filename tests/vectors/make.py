"""Writes ``vectors.json``: frames of protocol version 1 with their meaning, for other clients.

Run it with ``python tests/vectors/make.py`` after a change of the protocol. The file has

- ``valid``: frames as this implementation encodes them; decoding gives the meaning, encoding the
  meaning gives the bytes (map keys in the order of the meaning, shortest msgpack forms);
- ``accepted``: other encodings that a receiver must accept too;
- ``state``: blobs of named tensors;
- ``invalid``: frames, with the error code that a receiver must answer.

In a meaning, a tensor is ``{"dtype", "shape", "hex"}`` and binary data are ``{"hex"}``.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.checks import MAX_INT
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.evaluation import Evaluate, Evaluated
from edge_sdk.protocol.frames import Frame, decode, encode, pack_tensors, unpack_tensors
from edge_sdk.protocol.message import EXTENSIONS
from edge_sdk.protocol.messages import (
    VERSION,
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
    from_body,
)
from edge_sdk.protocol.release import Running
from edge_sdk.protocol.tensors import DTYPES, Array

FILE = Path(__file__).parent / "vectors.json"

HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
"""SHA-256 of the four bytes ``test``."""

INT8 = np.array([[-128, -1, 0], [1, 2, 127]], np.int8)
SCALE = np.array([[0.5], [1e-12]], np.float32)
LABELS = np.array([3, 0], np.int64)
PARTS: dict[str, Array] = {"h.q": INT8, "h.scale": SCALE}
PRESENT = np.array([1, 0, 0, 1], np.float32)
OTHER = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""SHA-256 of no bytes."""

BASES = {"3": HASH, "0": OTHER}
"""States of base networks by number, best first."""


def plain(value: Any) -> Any:
    """Return a decoded value in a form for JSON."""
    if isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value, DTYPES[value.dtype.name]).tobytes()
        return {"dtype": value.dtype.name, "shape": list(value.shape), "hex": raw.hex()}
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def value_of(meaning: Any) -> Any:
    """Inverse of :func:`plain`."""
    if isinstance(meaning, dict):
        if meaning.keys() == {"dtype", "shape", "hex"}:
            raw = np.frombuffer(bytes.fromhex(meaning["hex"]), DTYPES[meaning["dtype"]])
            return raw.reshape(meaning["shape"])
        if meaning.keys() == {"hex"}:
            return bytes.fromhex(meaning["hex"])
        return {key: value_of(item) for key, item in meaning.items()}
    return meaning


def meaning_of(frame: Frame) -> dict[str, Any]:
    """Return the meaning of a frame."""
    body = plain(frame.message.body(EXTENSIONS))
    return {"type": frame.message.TYPE, "seq": frame.seq, "ack": frame.ack, "body": body}


def frame_of(meaning: dict[str, Any]) -> Frame:
    """Inverse of :func:`meaning_of`."""
    message = from_body(meaning["type"], value_of(meaning["body"]), EXTENSIONS)
    return Frame(message, meaning["seq"], meaning["ack"])


def needed(message: Message) -> dict[str, list[str]]:
    """Return the extensions that a message needs, for its vector; nothing if it needs none."""

    def needs(extension: str) -> bool:
        try:
            message.body([name for name in EXTENSIONS if name != extension])
        except ProtocolError:
            return True
        return False

    names = [extension for extension in EXTENSIONS if needs(extension)]
    return {"extensions": names} if names else {}


VALID: list[tuple[str, Message, int, int]] = [
    ("hello", Hello(VERSION, "secret"), 0, 0),
    ("hello that resumes", Hello(VERSION, "secret", "small", "5f2a", 17), 0, 0),
    ("hello with text beyond ASCII", Hello(VERSION, "gehéim", "小"), 0, 0),
    ("hello with memory", Hello(VERSION, "secret", memory_mb=512), 0, 0),
    ("hello with extensions", Hello(VERSION, "secret", extensions=["pieces", "ü"]), 0, 0),
    ("welcome", Welcome(VERSION, "phone-1", "small", "5f2a", False, 0, HASH, 64, 2**26), 0, 0),
    (
        "welcome that resumes",
        Welcome(VERSION, "phone-1", "small", "5f2a", True, 300, HASH, 64, 2**26),
        0,
        300,
    ),
    (
        "welcome with a state",
        Welcome(VERSION, "phone-1", "small", "5f2a", False, 0, HASH, 64, 2**26, HASH),
        0,
        0,
    ),
    (
        "welcome with base networks",
        Welcome(VERSION, "phone-1", "small", "5f2a", False, 0, HASH, 64, 2**26, bases=BASES),
        0,
        0,
    ),
    (
        "welcome with extensions",
        Welcome(
            VERSION, "phone-1", "small", "5f2a", False, 0, HASH, 64, 2**26, extensions=["pieces"]
        ),
        0,
        0,
    ),
    (
        "welcome with a release",
        Welcome(
            VERSION,
            "phone-1",
            "small",
            "5f2a",
            False,
            0,
            HASH,
            64,
            2**26,
            extensions=["release"],
            release=7,
        ),
        0,
        0,
    ),
    (
        "welcome with pieces",
        Welcome(
            VERSION,
            "phone-1",
            "small",
            "5f2a",
            False,
            0,
            HASH,
            64,
            2**26,
            extensions=["pieces"],
            max_message=2**27,
        ),
        0,
        0,
    ),
    ("piece", Piece(b"\x92\xa6update\x85"), 4, 1),
    ("last piece", Piece(b"\x01", last=True), 5, 1),
    ("blob_get", BlobGet(HASH, 0), 0, 0),
    ("blob_get further on", BlobGet(HASH, 2**32), 0, 5),
    ("blob", Blob(HASH, 0, 4, b"test"), 0, 0),
    ("blob of nothing", Blob(HASH, 4, 4, b""), 0, 0),
    ("ready", Ready(1000), 1, 0),
    ("ready with another bundle", Ready(1000, "large"), 3, 2),
    ("ready with more examples", Ready(1200, from_round=4), 9, 6),
    ("move", Move("large", HASH, "there is time for it"), 2, 1),
    (
        "round",
        Round(3, HASH, 1, 32, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005}, "train", 7),
        1,
        1,
    ),
    ("round without activations", Round(4, HASH, 5, 1, {"lr": 1}, "none", MAX_INT), 2, 2),
    (
        "round with gradients that come back late",
        Round(5, HASH, 1, 32, {"lr": 0.05}, "returned", 7, 2),
        3,
        2,
    ),
    ("round whose labels stay", Round(6, HASH, 1, 32, {"lr": 0.05}, "u_shaped", 7), 3, 2),
    (
        "round with both gradients",
        Round(7, HASH, 1, 32, {"lr": 0.05, "own": 0.25}, "fused", 7),
        3,
        2,
    ),
    (
        "round with base networks and adversarial examples",
        Round(
            8,
            None,
            1,
            32,
            {
                "lr": 0.05,
                "robustness": 0.5,
                "attack_epsilon": 0.03125,
                "attack_rate": 0.0078125,
                "attack_steps": 7,
                "attack_low": 0,
                "attack_high": 1,
            },
            "train",
            7,
            bases=BASES,
        ),
        3,
        2,
    ),
    ("decline", Decline(3, "battery low"), 2, 1),
    ("activations", Activations(3, 0, PARTS, LABELS), 2, 1),
    (
        "activations in half precision",
        Activations(3, 1, {"h": np.array([[1, -2], [0.5, 65504]], np.float16)}, LABELS),
        128,
        70000,
    ),
    ("activations without labels", Activations(6, 0, PARTS), 2, 1),
    ("activations of a base network", Activations(8, 0, PARTS, LABELS, 3, False, PRESENT), 2, 1),
    (
        "activations of adversarial examples",
        Activations(8, 0, PARTS, LABELS, 3, True, PRESENT),
        3,
        1,
    ),
    ("features", Features(6, 0, PARTS), 4, 2),
    ("feature_gradient", FeatureGradient(6, 0, PARTS, 2), 3, 4),
    ("update", Update(3, {"stem.0.weight": SCALE}, False, 1000, {"loss": 2.25}), 3, 1),
    ("last update", Update(3, {}, True, 1000, {"loss": 2.25, "accuracy": 0.125}), 4, 1),
    (
        "update of base networks",
        Update(8, {"base.3.stem.0.weight": SCALE, "base.0.stem.0.weight": SCALE}, True, 1000, {}),
        5,
        1,
    ),
    ("gradient", Gradient(3, 0, {"g": np.array([[1.5], [-2.5]], np.float32)}), 2, 2),
    (
        "gradient with the loss",
        Gradient(7, 0, {"g": np.array([[1.5], [-2.5]], np.float32)}, 2.25),
        3,
        2,
    ),
    ("infer", Infer(1, PARTS), 5, 2),
    ("infer with a tier", Infer(2, PARTS, "large"), 6, 2),
    ("infer of a base network", Infer(4, PARTS, None, 3), 7, 2),
    ("infer with noise norms", Infer(5, PARTS, None, 3, 0.5), 8, 2),
    (
        "answer",
        Answer(1, ["aux.3", "head"], np.arange(8, dtype=np.float32).reshape(2, 2, 2)),
        3,
        5,
    ),
    (
        "evaluate",
        Evaluate(3, ["device_alone", "through_hub", "ensemble"], 30, HASH),
        6,
        5,
    ),
    ("evaluate of base networks", Evaluate(4, ["mix"], 0.5, None, BASES), 7, 5),
    (
        "evaluated",
        Evaluated(3, 117, {"device_alone": 0.75, "through_hub": 1, "ensemble": 0.875}),
        7,
        6,
    ),
    ("evaluated nothing", Evaluated(4, 0, {}), 8, 7),
    ("running", Running(HASH), 1, 0),
    ("running the one before", Running(HASH, "1" * 64, "it answers differently"), 2, 0),
    ("running nothing", Running(None, HASH, "opset 25 is not known"), 3, 0),
    ("stop", Stop("all rounds are done"), 4, 5),
    ("stop with a final state", Stop("all rounds are done", HASH), 4, 5),
    ("stop with base networks", Stop("all rounds are done", None, BASES), 4, 5),
    ("bye", Bye("done"), 6, 4),
    ("error", Error(ErrorCode.UNKNOWN_BLOB, "the blob is not here", False, "hash"), 0, 6),
    ("error that is fatal", Error(ErrorCode.BAD_TOKEN, "the token is wrong", True), 0, 0),
    ("ack", Ack(), 0, 6),
    ("largest numbers", Decline(MAX_INT, ""), MAX_INT, MAX_INT),
    (
        "every dtype and odd shapes",
        Infer(
            2,
            {
                "float32": np.array([1.0, -0.0, math.inf, math.nan], np.float32),
                "float16": np.array([[1.0], [2.0]], np.float16),
                "int8": np.array(-5, np.int8),
                "uint8": np.zeros((0, 3), np.uint8),
                "int32": np.array([[[-(2**31), 2**31 - 1]]], np.int32),
                "int64": np.array([-(2**63), 2**63 - 1], np.int64),
            },
        ),
        7,
        4,
    ),
    ("tensor of more than 255 bytes", Infer(3, {"h": np.arange(300).astype(np.uint8)}), 8, 4),
]


def accepted() -> list[tuple[str, bytes]]:
    """Return frames that this encoder never makes and that every decoder must accept."""
    hello = {"tier": "small", "token": "secret", "version": 1}
    text32 = b"\xdb\x00\x00\x00\x05ready"
    wide = b"\xcf\x00\x00\x00\x00\x00\x00\x00\x01"
    body32 = b"\xdf\x00\x00\x00\x01\xd9\x07samples" + b"\xd3\x00\x00\x00\x00\x00\x00\x03\xe8"
    metrics = b"\x82\xa4loss" + b"\xca" + struct.pack(">f", 2.25) + b"\xa8accuracy\x01"
    update = (
        b"\x94\xa6update\x03\x01\x85\xa5round\x03\xa7tensors\x80\xa4done\xc2\xa7samples\x05"
        b"\xa7metrics" + metrics
    )
    payload = b"\x93\xa5uint8\x91\xd1\x00\x01\xc6\x00\x00\x00\x01\x07"
    tensor = b"\xc9" + struct.pack(">I", len(payload)) + b"\x01" + payload
    return [
        ("fields in another order", msgpack.packb(["hello", 0, 0, hello])),
        (
            "defaults spelled out",
            msgpack.packb(["hello", 0, 0, {**hello, "session": None, "last_seq": 0}]),
        ),
        ("no extensions", msgpack.packb(["hello", 0, 0, {**hello, "extensions": None}])),
        (
            "defaults of a model without base networks spelled out",
            msgpack.packb(["stop", 1, 0, {"reason": "", "state": None, "bases": None}]),
        ),
        (
            "robustness in single precision",
            b"\x94\xa5infer\x01\x00\x83\xa7request\x01\xa5parts\x80\xaarobustness\xca"
            + struct.pack(">f", 0.5),
        ),
        ("long forms", b"\xdd\x00\x00\x00\x04" + text32 + wide + b"\xcc\x00" + body32),
        ("single precision and integers among metrics", update),
        (
            "long forms inside a tensor",
            b"\x94\xa5infer\x01\x00\x82\xa7request\x01\xa5parts\x81\xa1h" + tensor,
        ),
    ]


STATES: list[tuple[str, dict[str, Any]]] = [
    ("no tensors", {}),
    ("two tensors", {"stem.0.weight": SCALE, "block.0.steps": np.array(3, np.int64)}),
]


def invalid() -> list[dict[str, Any]]:
    """Return frames that must be refused, each with its error code."""
    ready = {"samples": 1}
    infer = b"\x94\xa5infer\x01\x00\x82\xa7request\x01\xa5parts\x81\xa1h"

    def packed(*frame: object) -> bytes:
        data: bytes = msgpack.packb(list(frame))
        return data

    def tensor(*payload: object) -> bytes:
        data = packed(*payload)
        return infer + b"\xc7" + bytes([len(data), 1]) + data

    blob_get = {"hash": HASH, "offset": 0}
    update = {"round": 1, "tensors": {}, "done": True, "samples": 1}
    batch = {"round": 1, "batch": 0, "parts": {}}
    hello = {"version": 1, "token": "secret"}
    cases: list[tuple[str, bytes, str]] = [
        ("no bytes", b"", "bad_frame"),
        ("not msgpack", b"\xc1", "bad_frame"),
        ("truncated", packed("ready", 1, 0, ready)[:-1], "bad_frame"),
        ("trailing byte", packed("ready", 1, 0, ready) + b"\x00", "bad_frame"),
        ("a map", msgpack.packb({"type": "ack"}), "bad_frame"),
        ("three elements", packed("ack", 0, 0), "bad_frame"),
        ("five elements", packed("ack", 0, 0, {}, 0), "bad_frame"),
        ("text that is not UTF-8", b"\x94\xa3bye\x01\x00\x81\xa6reason\xa1\xff", "bad_frame"),
        ("an integer as a key", packed("ready", 1, 0, {1: 1}), "bad_frame"),
        ("seq negative", packed("ready", -1, 0, ready), "bad_frame"),
        ("seq a float", packed("ready", 1.0, 0, ready), "bad_frame"),
        ("seq true", packed("ready", True, 0, ready), "bad_frame"),
        ("ack beyond 63 bits", packed("ready", 1, 2**63, ready), "bad_frame"),
        ("seq 0 in a reliable message", packed("ready", 0, 0, ready), "bad_frame"),
        ("seq 1 in an unreliable message", packed("ack", 1, 0, {}), "bad_frame"),
        ("unknown extension type", infer + b"\xd4\x02\x00", "bad_frame"),
        ("array of 2**31 elements", b"\x94\xa5ready\x01\x00\xdd\x80\x00\x00\x00", "bad_frame"),
        ("map of 2**31 entries", b"\x94\xa5ready\x01\x00\xdf\x80\x00\x00\x00", "bad_frame"),
        ("binary of 2**31 bytes", b"\x94\xa5ready\x01\x00\xc6\x80\x00\x00\x00", "bad_frame"),
        ("unknown type", packed("greeting", 1, 0, {}), "unknown_type"),
        ("type as binary", packed(b"ready", 1, 0, ready), "unknown_type"),
        ("type nil", packed(None, 1, 0, ready), "unknown_type"),
        ("body nil", packed("ready", 1, 0, None), "bad_message"),
        ("body an array", packed("ready", 1, 0, [1]), "bad_message"),
        ("field missing", packed("ready", 1, 0, {}), "bad_message"),
        ("field unknown", packed("ready", 1, 0, {"samples": 1, "more": 1}), "bad_message"),
        ("integer too small", packed("ready", 1, 0, {"samples": 0}), "bad_message"),
        ("integer as a float", packed("ready", 1, 0, {"samples": 1.0}), "bad_message"),
        ("integer as true", packed("ready", 1, 0, {"samples": True}), "bad_message"),
        ("text as binary", packed("bye", 1, 0, {"reason": b"done"}), "bad_message"),
        ("text too long", packed("decline", 1, 0, {"round": 1, "reason": "x" * 4097}),
         "bad_message"),
        ("hash in upper case", packed("blob_get", 0, 0, {**blob_get, "hash": "A" * 64}),
         "bad_message"),
        ("hash too short", packed("blob_get", 0, 0, {**blob_get, "hash": "0" * 63}),
         "bad_message"),
        ("base beyond the last", packed("infer", 1, 0, {"request": 1, "parts": {}, "base": 64}),
         "bad_message"),
        ("state of a base that is no hash",
         packed("stop", 1, 0, {"reason": "", "bases": {"0": "test"}}), "bad_message"),
        ("states of bases in an array", packed("stop", 1, 0, {"reason": "", "bases": [HASH]}),
         "bad_message"),
        ("more bases than there can be",
         packed("stop", 1, 0, {"reason": "", "bases": {str(n): HASH for n in range(65)}}),
         "bad_message"),
        ("extensions in a text", packed("hello", 0, 0, {**hello, "extensions": "pieces"}),
         "bad_message"),
        ("an extension named twice", packed("hello", 0, 0, {**hello, "extensions": ["a", "a"]}),
         "bad_message"),
        ("an extension without a name", packed("hello", 0, 0, {**hello, "extensions": [""]}),
         "bad_message"),
        ("an extension with a long name",
         packed("hello", 0, 0, {**hello, "extensions": ["x" * 65]}), "bad_message"),
        ("too many extensions",
         packed("hello", 0, 0, {**hello, "extensions": [str(n) for n in range(17)]}),
         "bad_message"),
        ("noise as an integer", packed("activations", 1, 0, {**batch, "noise": 1}), "bad_message"),
        ("present as an array", packed("activations", 1, 0, {**batch, "present": [1, 0]}),
         "bad_message"),
        ("a piece that was not agreed on", packed("piece", 1, 0, {"data": b"1"}), "unknown_type"),
        ("robustness not finite",
         packed("infer", 1, 0, {"request": 1, "parts": {}, "robustness": math.inf}), "bad_message"),
        ("number not finite", packed("update", 1, 0, {**update, "metrics": {"loss": math.nan}}),
         "bad_message"),
        ("array for a tensor", packed("infer", 1, 0, {"request": 1, "parts": {"h": [1]}}),
         "bad_message"),
        ("tensor with fewer bytes than its shape", tensor("int8", [3], b"\x01\x02"), "bad_tensor"),
        ("tensor with more bytes than its shape", tensor("int8", [1], b"\x01\x02"), "bad_tensor"),
        ("tensor of unknown dtype", tensor("float64", [1], bytes(8)), "bad_tensor"),
        ("tensor with a negative dimension", tensor("int8", [-1], b""), "bad_tensor"),
        ("tensor of nine dimensions", tensor("int8", [1] * 9, b"\x01"), "bad_tensor"),
        ("tensor with huge dimensions", tensor("int8", [2**62, 0, 2**62], b""), "bad_tensor"),
        ("tensor of two elements", tensor("int8", [0]), "bad_tensor"),
        ("tensor with a trailing byte", infer + b"\xc7\x0b\x01\x93\xa4int8\x90\xc4\x01\x05\x00",
         "bad_tensor"),
    ]  # fmt: skip
    vectors: list[dict[str, Any]] = [
        {"name": name, "hex": data.hex(), "error": code} for name, data, code in cases
    ]
    vectors.append({"name": "a text frame", "text": '["ack", 0, 0, {}]', "error": "bad_frame"})
    big = packed("ready", 1, 0, ready)
    vectors.append(
        {
            "name": "one byte over the limit",
            "hex": big.hex(),
            "max_frame": len(big) - 1,
            "error": "frame_too_big",
        }
    )
    return vectors


def build() -> dict[str, Any]:
    """Return all vectors."""
    return {
        "protocol": VERSION,
        "valid": [
            {
                "name": name,
                "hex": encode(message, seq, ack, EXTENSIONS).hex(),
                "meaning": meaning_of(Frame(message, seq, ack)),
                **needed(message),
            }
            for name, message, seq, ack in VALID
        ],
        "accepted": [
            {"name": name, "hex": data.hex(), "meaning": meaning_of(decode(data))}
            for name, data in accepted()
        ],
        "state": [
            {
                "name": name,
                "hex": pack_tensors(tensors).hex(),
                "meaning": plain(unpack_tensors(pack_tensors(tensors))),
            }
            for name, tensors in STATES
        ],
        "invalid": invalid(),
    }


def text() -> str:
    """Return the content of the file."""
    return json.dumps(build(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
    print(f"wrote {FILE}")
