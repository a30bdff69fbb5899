"""A device as apps had it before the protocol had extensions: it sends what was recorded then.

It has an encoder and a decoder of its own and shares no code with the packages, so that it stays as
it is when they change. It is as strict as that device was: a message, a field or a manifest that it
does not know is an error, which it reports to the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.client import ClientConnection, connect

DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "i1", "uint8": "u1", "int32": "<i4",
          "int64": "<i8"}  # fmt: skip
LARGEST = 2**63 - 1

Check = Callable[[Any], bool]


def integer(low: int = 0, high: int = LARGEST) -> Check:
    return lambda v: type(v) is int and low <= v <= high


def text(limit: int = 4096) -> Check:
    return lambda v: isinstance(v, str) and len(v) <= limit


def or_nil(check: Check) -> Check:
    return lambda v: v is None or check(v)


def is_hash(v: Any) -> bool:
    return isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None


def is_number(v: Any) -> bool:
    return isinstance(v, int | float) and type(v) is not bool and math.isfinite(v)


def is_flag(v: Any) -> bool:
    return isinstance(v, bool)


def is_tensor(v: Any) -> bool:
    return isinstance(v, np.ndarray)


def map_of(check: Check, most: int) -> Check:
    return lambda v: (
        isinstance(v, dict) and len(v) <= most and all(len(k) <= 512 and check(v[k]) for k in v)
    )


def is_names(v: Any) -> bool:
    return isinstance(v, list) and len(v) <= 1024 and all(text(512)(name) for name in v)


def is_mode(v: Any) -> bool:
    return v in ("none", "train", "forward", "returned", "fused", "u_shaped")


TENSORS, NUMBERS, STATES = map_of(is_tensor, 65536), map_of(is_number, 64), map_of(is_hash, 64)

REQUIRED: dict[str, dict[str, Check]] = {
    "welcome": {
        "version": integer(0, 10**6), "device": text(128), "tier": text(128), "session": text(64),
        "resumed": is_flag, "last_seq": integer(), "manifest": is_hash, "window": integer(1),
        "max_frame": integer(1024),
    },
    "blob": {
        "hash": is_hash, "offset": integer(), "size": integer(),
        "data": lambda v: isinstance(v, bytes),
    },
    "round": {
        "round": integer(1), "state": or_nil(is_hash), "epochs": integer(),
        "batch_size": integer(1), "hyper": NUMBERS, "activations": is_mode, "seed": integer(),
    },
    "features": {"round": integer(1), "batch": integer(), "parts": TENSORS},
    "gradient": {"round": integer(1), "batch": integer(), "parts": TENSORS},
    "move": {"tier": text(128), "manifest": is_hash, "reason": text()},
    "stop": {"reason": text()},
    "answer": {"request": integer(1), "heads": is_names, "logits": is_tensor},
    "error": {"code": text(64), "message": text(), "fatal": is_flag},
    "ack": {},
}  # fmt: skip
"""The messages of a hub, with the fields that each must have."""

OPTIONAL: dict[str, dict[str, Check]] = {
    "welcome": {"state": or_nil(is_hash), "bases": or_nil(STATES)},
    "round": {"staleness": integer(0, 1024), "bases": or_nil(STATES)},
    "gradient": {"loss": or_nil(is_number)},
    "stop": {"state": or_nil(is_hash), "bases": or_nil(STATES)},
    "error": {"field": or_nil(text(512))},
}
"""The fields that may be left out."""

UNRELIABLE = ("hello", "welcome", "blob_get", "blob", "error", "ack")

MANIFEST = {
    "tier", "cut", "runtime", "task", "classes", "limits", "heads", "optimizer", "codec", "packed",
    "state", "graphs", "initial_state", "constants", "blobs", "bases", "whole", "base_states",
}  # fmt: skip
"""The keys that a manifest must have. Others are ignored."""


class Refused(Exception):
    """The device does not understand the hub; ``code`` is what it reports."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def unpack(code: int, payload: bytes) -> Any:
    """A tensor."""
    if code != 1:
        raise Refused("bad_frame", f"extension type {code}")
    dtype, shape, raw = msgpack.unpackb(payload)
    return np.frombuffer(raw, DTYPES[dtype]).reshape(shape)


def decode(frame: bytes) -> tuple[str, int, int, dict[str, Any]]:
    """Type, seq, ack and body of a hub's frame."""
    kind, seq, ack, body = msgpack.unpackb(frame, ext_hook=unpack)
    if kind not in REQUIRED:
        raise Refused("unknown_type", f"unknown message type {kind!r}")
    if (seq == 0) != (kind in UNRELIABLE):
        raise Refused("bad_frame", f"seq {seq} of {kind}")
    required, optional = REQUIRED[kind], OPTIONAL.get(kind, {})
    for name in body:
        if name not in required and name not in optional:
            raise Refused("bad_message", f"{kind} has no field {name!r}")
    for name in required:
        if name not in body:
            raise Refused("bad_message", f"{kind} lacks the field {name!r}")
    for name, check in (required | optional).items():
        if name in body and not check(body[name]):
            raise Refused("bad_message", f"{kind}.{name} is wrong")
    return kind, seq, ack, body


class RecordedDevice:
    """Plays a recording to a hub, and adapts only what is the hub's: names of blobs and numbers.

    Args:
        recording: file of the frames.
        token: the device's token.
    """

    def __init__(self, recording: Path, token: str) -> None:
        self._token = token
        self._frames: dict[str, list[Any]] = {}
        for entry in json.loads(recording.read_text("utf-8")):
            if entry["from"] == "device":
                kind, _, _, body = msgpack.unpackb(
                    base64.b64decode(entry["base64"]),
                    ext_hook=lambda code, data: msgpack.ExtType(code, data),
                )
                self._frames.setdefault(kind, []).append(body)
        self._sent = self._settled = self._acknowledged = 0
        self.received: list[str] = []
        """Types of the messages that came, in order."""
        self.rounds: list[int] = []
        """Numbers of the rounds that the device trained in."""
        self.reason: str | None = None
        """Reason of the hub's ``stop``."""
        self.answer: Any = None
        """The hub's logits for the recorded question."""

    async def run(self, url: str) -> None:
        """Take part in a job from ``hello`` to ``bye``.

        Raises:
            Refused: the hub sent what this device does not understand, or an error.
        """
        async with connect(
            url,
            subprotocols=["cutlayer.v1"],
            compression=None,
            max_size=2**26,  # type: ignore[list-item]
        ) as connection:
            try:
                await self._take_part(connection)
            except Refused as refused:
                await self._say(
                    connection, "error",
                    {"code": refused.code, "message": refused.message, "fatal": True},
                )  # fmt: skip
                raise

    async def _take_part(self, connection: ClientConnection) -> None:
        await self._say(connection, "hello", self._frames["hello"][0] | {"token": self._token})
        welcome = await self._hear(connection, "welcome")
        manifest = json.loads(await self._download(connection, welcome["manifest"]))
        if manifest["format"] != 3:
            raise Refused("bad_message", f"the manifest has format {manifest['format']}")
        if missing := MANIFEST - manifest.keys():
            raise Refused("bad_message", f"the manifest lacks {missing}")
        for name, size in manifest["blobs"].items():
            if len(await self._download(connection, name)) != size:
                raise Refused("bad_message", f"blob {name} does not have {size} bytes")
        await self._say(connection, "ready", self._frames["ready"][0])
        batches, updates = self._frames["activations"], self._frames["update"]
        while True:
            kind, body = await self._next(connection)
            if kind == "stop":
                break
            if kind != "round":
                continue
            number, first = body["round"], updates[len(self.rounds)]["round"]
            await self._download(connection, body["state"])
            for batch in batches:
                if batch["round"] == first:
                    await self._say(connection, "activations", batch | {"round": number})
            await self._say(connection, "update", updates[len(self.rounds)] | {"round": number})
            self.rounds.append(number)
        self.reason = body["reason"]
        await self._download(connection, body["state"])
        await self._say(connection, "infer", self._frames["infer"][0])
        self.answer = (await self._hear(connection, "answer"))["logits"]
        await self._say(connection, "bye", self._frames["bye"][0])
        while self._acknowledged < self._sent:
            await self._next(connection)

    async def _download(self, connection: ClientConnection, name: str) -> bytes:
        data = b""
        while True:
            await self._say(connection, "blob_get", {"hash": name, "offset": len(data)})
            piece = await self._hear(connection, "blob")
            data += piece["data"]
            if len(data) >= piece["size"]:
                break
        if hashlib.sha256(data).hexdigest() != name:
            raise Refused("bad_message", f"blob {name} is damaged")
        return data

    async def _say(self, connection: ClientConnection, kind: str, body: dict[str, Any]) -> None:
        reliable = kind not in UNRELIABLE
        self._sent += reliable
        seq = self._sent if reliable else 0
        await connection.send(msgpack.packb([kind, seq, self._settled, body]))

    async def _hear(self, connection: ClientConnection, wanted: str) -> dict[str, Any]:
        """The next message, which must be of this type; acknowledgements go by."""
        while True:
            kind, body = await self._next(connection)
            if kind == wanted:
                return body
            if kind != "ack":
                raise Refused("bad_message", f"{kind} came for {wanted}")

    async def _next(self, connection: ClientConnection) -> tuple[str, dict[str, Any]]:
        frame = await connection.recv()
        assert isinstance(frame, bytes)
        kind, seq, ack, body = decode(frame)
        if ack > self._sent:
            raise Refused("bad_frame", f"ack {ack} was never sent")
        self._acknowledged = max(self._acknowledged, ack)
        if seq:
            if seq != self._settled + 1:
                raise Refused("bad_frame", f"seq {seq} came after {self._settled}")
            self._settled = seq
        self.received.append(kind)
        if kind == "error":
            raise Refused(body["code"], body["message"])
        return kind, body
