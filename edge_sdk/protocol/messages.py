"""The messages of protocol version 1, each a frozen dataclass that is validated on decode.

``docs/protocol.md`` says when each is sent. A message's body is a msgpack map from field name to
value; a field that is unknown, missing or of the wrong type is a :class:`ProtocolError` that
names it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import Array

VERSION = 1
SUBPROTOCOL = "cutlayer.v1"

MAX_TENSORS = 65_536
MAX_TEXT = 4_096
MAX_INT = 2**63 - 1

_HASH = re.compile(r"[0-9a-f]{64}")

Check = Callable[[object], str | None]
"""Returns what a value must be, or None when it is that."""


def _integer(low: int = 0, high: int = MAX_INT) -> Check:
    def check(value: object) -> str | None:
        ok = type(value) is int and low <= value <= high
        return None if ok else f"an integer from {low} to {high}"

    return check


def _text(limit: int = MAX_TEXT) -> Check:
    def check(value: object) -> str | None:
        ok = isinstance(value, str) and len(value) <= limit
        return None if ok else f"text of at most {limit} characters"

    return check


def _choice(*choices: str) -> Check:
    def check(value: object) -> str | None:
        ok = isinstance(value, str) and value in choices
        return None if ok else f"one of {', '.join(choices)}"

    return check


def _optional(inner: Check) -> Check:
    def check(value: object) -> str | None:
        wanted = None if value is None else inner(value)
        return None if wanted is None else f"nil or {wanted}"

    return check


def _flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _hash(value: object) -> str | None:
    ok = isinstance(value, str) and _HASH.fullmatch(value)
    return None if ok else "a sha256 as 64 lower-case hexadecimal digits"


def _data(value: object) -> str | None:
    return None if isinstance(value, bytes) else "binary data"


def _tensor(value: object) -> str | None:
    return None if isinstance(value, np.ndarray) else "a tensor"


def _map_of(what: str, kind: Callable[[object], bool], limit: int) -> Check:
    def check(value: object) -> str | None:
        ok = (
            isinstance(value, dict)
            and len(value) <= limit
            and all(isinstance(k, str) and len(k) <= 512 and kind(v) for k, v in value.items())
        )
        return None if ok else f"a map from text to {what}, of at most {limit} entries"

    return check


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _number(value: object) -> str | None:
    return None if _finite(value) else "a finite number"


_tensors = _map_of("tensors", lambda v: isinstance(v, np.ndarray), MAX_TENSORS)
_numbers = _map_of("finite numbers", _finite, 64)


MAX_BASES = 64
"""Base networks that a model may be split into."""

_hashes = _map_of("sha256s", lambda v: _hash(v) is None, MAX_BASES)


def _states(value: object) -> str | None:
    wanted = _hashes(value)
    if wanted is not None:
        return wanted
    assert isinstance(value, dict)
    numbers = all(re.fullmatch("0|[1-9][0-9]?", key) and int(key) < MAX_BASES for key in value)
    return None if numbers else f"a map from numbers below {MAX_BASES}, as text, to sha256s"


def _names(value: object) -> str | None:
    ok = (
        isinstance(value, list)
        and len(value) <= 1024
        and all(isinstance(name, str) and len(name) <= 512 for name in value)
    )
    return None if ok else "a list of at most 1024 names"


def _must(check: Check, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with a check; a field with a default may be left out on the wire."""
    return field(default=default, metadata={"check": check})


class Message:
    """Base of all messages.

    Attributes:
        TYPE: the name of the message on the wire.
        RELIABLE: whether it carries a sequence number and is delivered exactly once.
    """

    TYPE: ClassVar[str]
    RELIABLE: ClassVar[bool] = True

    def body(self) -> dict[str, Any]:
        """The map that travels. Fields that have their default are left out."""
        return {
            f.name: value
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) is not f.default
        }


# --- device -> hub ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(Message):
    """First frame of a connection: the token says who the device is.

    ``tier`` is nil to take the one that the hub has for the device: where it has moved it to, else
    the one that the token was issued for. ``session`` is to be resumed. ``memory_mb`` is what the
    device can spare for training, if it says so.
    """

    TYPE = "hello"
    RELIABLE = False
    version: int = _must(_integer(0, 1_000_000))
    token: str = _must(_text(512))
    tier: str | None = _must(_optional(_text(128)), None)
    session: str | None = _must(_optional(_text(64)), None)
    last_seq: int = _must(_integer(), 0)
    memory_mb: int | None = _must(_optional(_integer(1)), None)


@dataclass(frozen=True)
class Ready(Message):
    """The bundle of ``tier`` is loaded; the device can be picked for rounds.

    ``tier`` is nil for the one that the hub's welcome named.
    """

    TYPE = "ready"
    samples: int = _must(_integer(1))
    tier: str | None = _must(_optional(_text(128)), None)


@dataclass(frozen=True)
class Decline(Message):
    """The device will not take part in this round."""

    TYPE = "decline"
    round: int = _must(_integer(1))
    reason: str = _must(_text())


@dataclass(frozen=True)
class BlobGet(Message):
    """Asks for a piece of a blob; the answer is one ``blob``."""

    TYPE = "blob_get"
    RELIABLE = False
    hash: str = _must(_hash)
    offset: int = _must(_integer())


@dataclass(frozen=True)
class _OfBatch(Message):
    """A message about batch number ``batch`` of a device in a round."""

    round: int = _must(_integer(1))
    batch: int = _must(_integer())


@dataclass(frozen=True)
class Batch:
    """Packed activations of some rows, from the device's learner to the trunk's step.

    Attributes:
        parts: the packed tensors by name, as the manifest's ``packed`` lists them.
        labels: (rows,) int64; (rows, positions) for a model of tokens, where -1 does not count.
            None in rounds in which labels stay on the device.
        base: number of the base network that the activations are of; 0 for a single model.
        noise: whether they have come through the noise norms.
        present: (classes,) float32, 1 for classes that the device has examples of, 0 for those
            that its loss leaves out; None where all classes count.
    """

    parts: dict[str, Array] = _must(_tensors)
    labels: Array | None = _must(_optional(_tensor), None)
    base: int = _must(_integer(0, MAX_BASES - 1), 0)
    noise: bool = _must(_flag, False)
    present: Array | None = _must(_optional(_tensor), None)

    @classmethod
    def of(cls, message: Batch) -> Batch:
        """The batch without what else a message says."""
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class HeadGradient:
    """What a device's head makes of the features of a batch whose labels stay on the device.

    Attributes:
        parts: packed gradient of the mean loss with respect to the features, by name.
        labels: number of labels that the mean is over.
    """

    parts: dict[str, Array] = _must(_tensors)
    labels: int = _must(_integer(1))

    @classmethod
    def of(cls, message: HeadGradient) -> HeadGradient:
        """The gradient without what else a message says."""
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Activations(Batch, _OfBatch):
    """A :class:`Batch` on its way to the hub."""

    TYPE = "activations"


@dataclass(frozen=True)
class FeatureGradient(HeadGradient, _OfBatch):
    """A :class:`HeadGradient` on its way to the hub, in answer to ``features``."""

    TYPE = "feature_gradient"


@dataclass(frozen=True)
class Update(Message):
    """Trained parameters, in as many messages as the frame limit needs; ``done`` in the last."""

    TYPE = "update"
    round: int = _must(_integer(1))
    tensors: dict[str, Array] = _must(_tensors)
    done: bool = _must(_flag)
    samples: int = _must(_integer(1))
    metrics: dict[str, float] = _must(_numbers)


@dataclass(frozen=True)
class Infer(Message):
    """Asks the hub to finish an answer from activations that the bundle of ``tier`` has packed.

    ``tier`` is nil for the device's present one. Of several base networks ``base`` is the one that
    they are of; ``robustness`` mixes the hub's dual norms, if the model has any.
    """

    TYPE = "infer"
    request: int = _must(_integer(1))
    parts: dict[str, Array] = _must(_tensors)
    tier: str | None = _must(_optional(_text(128)), None)
    base: int = _must(_integer(0, MAX_BASES - 1), 0)
    robustness: float = _must(_number, 0.0)


@dataclass(frozen=True)
class Bye(Message):
    """The device leaves for good; its session ends."""

    TYPE = "bye"
    reason: str = _must(_text())


# --- hub -> device ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome(Message):
    """Answer to ``hello``. ``resumed`` says whether the session of the hello goes on.

    ``state`` is the tier's present state, or nil while it is the bundle's initial one. Of several
    base networks ``bases`` has the present states, by number, those that answer best first.
    """

    TYPE = "welcome"
    RELIABLE = False
    version: int = _must(_integer(0, 1_000_000))
    device: str = _must(_text(128))
    tier: str = _must(_text(128))
    session: str = _must(_text(64))
    resumed: bool = _must(_flag)
    last_seq: int = _must(_integer())
    manifest: str = _must(_hash)
    window: int = _must(_integer(1))
    max_frame: int = _must(_integer(1024))
    state: str | None = _must(_optional(_hash), None)
    bases: dict[str, str] | None = _must(_optional(_states), None)


@dataclass(frozen=True)
class Blob(Message):
    """A piece of a blob, from ``offset`` on; the blob has ``size`` bytes in all."""

    TYPE = "blob"
    RELIABLE = False
    hash: str = _must(_hash)
    offset: int = _must(_integer())
    size: int = _must(_integer())
    data: bytes = _must(_data)


@dataclass(frozen=True)
class Round(Message):
    """Start of a round: where the state is, and how to train.

    No epochs mean that activations are wanted, but no training. ``staleness`` is for returned
    gradients: so many batches more than one may be on their way. ``bases`` are the base networks
    that the device is to train, with their states, by number; then ``state`` is nil.
    """

    TYPE = "round"
    round: int = _must(_integer(1))
    state: str | None = _must(_optional(_hash))
    epochs: int = _must(_integer())
    batch_size: int = _must(_integer(1))
    hyper: dict[str, float] = _must(_numbers)
    activations: ActivationMode = _must(_choice(*ActivationMode))
    seed: int = _must(_integer())
    staleness: int = _must(_integer(0, 1024), 0)
    bases: dict[str, str] | None = _must(_optional(_states), None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", ActivationMode(self.activations))


@dataclass(frozen=True)
class Features(Message):
    """What leaves the last block for the activations of one batch, packed as these are."""

    TYPE = "features"
    round: int = _must(_integer(1))
    batch: int = _must(_integer())
    parts: dict[str, Array] = _must(_tensors)


@dataclass(frozen=True)
class Gradient(Message):
    """Packed gradient of the activations of one batch, in rounds with returned gradients.

    It is that of the mean loss over the batch, which is ``loss`` if it is there.
    """

    TYPE = "gradient"
    round: int = _must(_integer(1))
    batch: int = _must(_integer())
    parts: dict[str, Array] = _must(_tensors)
    loss: float | None = _must(_optional(_number), None)


@dataclass(frozen=True)
class Move(Message):
    """The device is to go on with the bundle of another tier; it says ``ready`` when it can."""

    TYPE = "move"
    tier: str = _must(_text(128))
    manifest: str = _must(_hash)
    reason: str = _must(_text())


@dataclass(frozen=True)
class Stop(Message):
    """The job is over. ``state`` is the final state, if there is one to fetch, or ``bases`` are."""

    TYPE = "stop"
    reason: str = _must(_text())
    state: str | None = _must(_optional(_hash), None)
    bases: dict[str, str] | None = _must(_optional(_states), None)


@dataclass(frozen=True)
class Answer(Message):
    """The hub's half of an answer: logits (heads, batch, classes) of the heads it holds."""

    TYPE = "answer"
    request: int = _must(_integer(1))
    heads: list[str] = _must(_names)
    logits: Array = _must(_tensor)


@dataclass(frozen=True)
class Error(Message):
    """What was wrong. After a fatal one the sender closes the connection and ends the session."""

    TYPE = "error"
    RELIABLE = False
    code: str = _must(_text(64))
    message: str = _must(_text())
    fatal: bool = _must(_flag)
    field: str | None = _must(_optional(_text(512)), None)


# --- both ways ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ack(Message):
    """Carries an acknowledgement when nothing else is going that way."""

    TYPE = "ack"
    RELIABLE = False


MESSAGES: dict[str, type[Message]] = {
    cls.TYPE: cls
    for cls in (
        Hello, Ready, Decline, BlobGet, Activations, FeatureGradient, Update, Infer, Bye,
        Welcome, Blob, Round, Features, Gradient, Move, Stop, Answer, Error, Ack,
    )
}  # fmt: skip


def from_body(kind: object, body: object) -> Message:
    """Build the message of type ``kind`` from its decoded body.

    Raises:
        ProtocolError: unknown type, or a field that is unknown, missing or wrong.
    """
    cls = MESSAGES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        shown = repr(kind[:64]) if isinstance(kind, str) else f"of type {type(kind).__name__}"
        raise ProtocolError("unknown_type", f"unknown message type {shown}")
    if not isinstance(body, dict):
        raise ProtocolError("bad_message", f"the body of {kind} must be a map")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in body:
        if name not in fields:
            shown = str(name)[:64]
            raise ProtocolError("bad_message", f"{kind} has no field {shown!r}", shown)
    for name, spec in fields.items():
        if name not in body:
            if spec.default is dataclasses.MISSING:
                raise ProtocolError("bad_message", f"{kind} lacks the field {name!r}", name)
            continue
        wanted = spec.metadata["check"](body[name])
        if wanted is not None:
            raise ProtocolError("bad_message", f"{kind}.{name} must be {wanted}", name)
    return cls(**body)
