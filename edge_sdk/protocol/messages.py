"""The messages of protocol version 1, each a frozen dataclass that is validated on decode.

``docs/protocol.md`` says when each is sent. A message's body is a msgpack map from field name to
value. A field that is unknown, missing or wrong raises a :class:`ProtocolError` that names it.
:mod:`edge_sdk.protocol.message` has what all of them share, and says how extensions are declared.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol import checks
from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.checks import MAX_BASES, checked
from edge_sdk.protocol.enums import ActivationMode, ErrorCode
from edge_sdk.protocol.evaluation import Evaluate, Evaluated
from edge_sdk.protocol.message import PIECES, RECOUNT, RELEASE
from edge_sdk.protocol.message import Message as Message
from edge_sdk.protocol.release import Running
from edge_sdk.protocol.tensors import Array

VERSION = 1
SUBPROTOCOL = "cutlayer.v1"


# --- device -> hub ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello(Message):
    """First frame of a connection.

    Attributes:
        version: protocol version.
        token: secret that says which device this is.
        tier: tier whose bundle the device can carry. None takes the one that the hub has moved the
            device to, else the one that the token was issued for.
        session: session to resume; None for a new one.
        last_seq: every number up to this one that came from the hub is settled.
        memory_mb: MB that the device can spare for training; None if it does not say.
        extensions: names of the extensions that the device speaks; None for none.
    """

    TYPE = "hello"
    RELIABLE = False
    version: int = checked(checks.integer(0, 1_000_000))
    token: str = checked(checks.text(512))
    tier: str | None = checked(checks.optional(checks.text(128)), None)
    session: str | None = checked(checks.optional(checks.text(64)), None)
    last_seq: int = checked(checks.integer(), 0)
    memory_mb: int | None = checked(checks.optional(checks.integer(1)), None)
    extensions: list[str] | None = checked(checks.optional(checks.extensions), None)


@dataclass(frozen=True)
class Ready(Message):
    """The bundle is loaded; the device can be picked for rounds. Or: ``samples`` has changed.

    Attributes:
        samples: number of local examples.
        tier: tier of the loaded bundle; None for the one that ``welcome`` named.
        from_round: the round that the device begins with another number of examples; None if it
            joins, or has moved.
    """

    TYPE = "ready"
    samples: int = checked(checks.integer(1))
    tier: str | None = checked(checks.optional(checks.text(128)), None)
    from_round: int | None = checked(checks.optional(checks.integer(1)), None, extension=RECOUNT)


DIVERGED = "training diverged"
"""How the reason of a :class:`Decline` begins if training has diverged on the device."""


@dataclass(frozen=True)
class Decline(Message):
    """The device does not take part in this round, or not to its end."""

    TYPE = "decline"
    round: int = checked(checks.integer(1))
    reason: str = checked(checks.text())

    @property
    def diverged(self) -> bool:
        """Whether training has diverged on the device."""
        return self.reason.startswith(DIVERGED)


@dataclass(frozen=True)
class BlobGet(Message):
    """Asks for a piece of a blob; the answer is one ``blob``."""

    TYPE = "blob_get"
    RELIABLE = False
    hash: str = checked(checks.sha256)
    offset: int = checked(checks.integer())


@dataclass(frozen=True)
class _OfBatch(Message):
    """A message about batch number ``batch`` of a device in round number ``round``."""

    round: int = checked(checks.integer(1))
    batch: int = checked(checks.integer())


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
    """Trained parameters, in as many messages as the frame limit needs.

    Attributes:
        round: number of the round.
        tensors: trained tensors by name.
        done: whether this is the last message of the update.
        samples: number of local examples.
        metrics: ``loss``, ``accuracy``, ``compute_s`` and ``wait_s``, as far as they are known.
    """

    TYPE = "update"
    round: int = checked(checks.integer(1))
    tensors: dict[str, Array] = checked(checks.tensors)
    done: bool = checked(checks.flag)
    samples: int = checked(checks.integer(1))
    metrics: dict[str, float] = checked(checks.numbers)


@dataclass(frozen=True)
class Infer(Message):
    """Asks the hub to finish an answer from packed activations.

    Attributes:
        request: number that the device chooses, not used before in the session.
        parts: the packed tensors by name.
        tier: tier of the bundle that packed them; None for the device's present one.
        base: number of the base network that they belong to; 0 for a single model.
        robustness: weight of the noise norms above the cut, from 0 to 1.
    """

    TYPE = "infer"
    request: int = checked(checks.integer(1))
    parts: dict[str, Array] = checked(checks.tensors)
    tier: str | None = checked(checks.optional(checks.text(128)), None)
    base: int = checked(checks.integer(0, MAX_BASES - 1), 0)
    robustness: float = checked(checks.number, 0.0)


@dataclass(frozen=True)
class Bye(Message):
    """The device leaves for good; its session ends."""

    TYPE = "bye"
    reason: str = checked(checks.text())


# --- hub -> device ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome(Message):
    """Answer to ``hello``.

    Attributes:
        version: protocol version.
        device: name of the device at the hub.
        tier: its tier.
        session: the session, to be named in a later ``hello``.
        resumed: whether the session of the ``hello`` goes on; else this is a new one.
        last_seq: every number up to this one that came from the device is settled.
        manifest: sha256 of the manifest of the tier's bundle.
        window: how many messages each side may leave unsettled.
        max_frame: bytes of the largest frame that the hub takes.
        state: sha256 of the tier's present state; None while it is the bundle's initial one.
        bases: sha256 of the present state of each base network by number, best first; None for a
            single model.
        extensions: the extensions that the session uses: of those in the ``hello`` that began it,
            the ones that the hub speaks; None for none.
        max_message: bytes of the largest message that the hub takes in pieces; None where pieces
            are not agreed on.
        release: number of the release that the bundle is of, or 0 for the model of a job; the hub
            then answers no questions. None where the device may train and ask.
    """

    TYPE = "welcome"
    RELIABLE = False
    version: int = checked(checks.integer(0, 1_000_000))
    device: str = checked(checks.text(128))
    tier: str = checked(checks.text(128))
    session: str = checked(checks.text(64))
    resumed: bool = checked(checks.flag)
    last_seq: int = checked(checks.integer())
    manifest: str = checked(checks.sha256)
    window: int = checked(checks.integer(1))
    max_frame: int = checked(checks.integer(1024))
    state: str | None = checked(checks.optional(checks.sha256), None)
    bases: dict[str, str] | None = checked(checks.optional(checks.states), None)
    extensions: list[str] | None = checked(checks.optional(checks.extensions), None)
    max_message: int | None = checked(checks.optional(checks.integer(1024)), None, extension=PIECES)
    release: int | None = checked(checks.optional(checks.integer()), None, extension=RELEASE)


@dataclass(frozen=True)
class Blob(Message):
    """A piece of a blob, from byte ``offset`` on; the whole blob has ``size`` bytes."""

    TYPE = "blob"
    RELIABLE = False
    hash: str = checked(checks.sha256)
    offset: int = checked(checks.integer())
    size: int = checked(checks.integer())
    data: bytes = checked(checks.data)


@dataclass(frozen=True)
class Round(Message):
    """Start of a round: where the state is, and how to train.

    Attributes:
        round: number of the round.
        state: sha256 of the state to start from; None if ``bases`` takes its place.
        epochs: passes over the local examples; 0 if only activations are wanted.
        batch_size: rows of a batch.
        hyper: hyper-parameters by name.
        activations: when activations are sent, and what comes back for them.
        seed: seed of the order of the examples.
        staleness: with returned gradients, how many further batches may be in flight while the
            device waits for a gradient.
        bases: sha256 of the state to start from, by number of each base network that the device
            trains; None for a single model.
    """

    TYPE = "round"
    round: int = checked(checks.integer(1))
    state: str | None = checked(checks.optional(checks.sha256))
    epochs: int = checked(checks.integer())
    batch_size: int = checked(checks.integer(1))
    hyper: dict[str, float] = checked(checks.numbers)
    activations: ActivationMode = checked(checks.choice(*ActivationMode))
    seed: int = checked(checks.integer())
    staleness: int = checked(checks.integer(0, 1024), 0)
    bases: dict[str, str] | None = checked(checks.optional(checks.states), None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", ActivationMode(self.activations))


@dataclass(frozen=True)
class Features(Message):
    """Features of one batch: the packed output of the model's last block for its activations."""

    TYPE = "features"
    round: int = checked(checks.integer(1))
    batch: int = checked(checks.integer())
    parts: dict[str, Array] = checked(checks.tensors)


@dataclass(frozen=True)
class Gradient(Message):
    """Packed gradient of a batch's mean loss with respect to its activations.

    Attributes:
        round: number of the round.
        batch: number of the batch.
        parts: the packed gradient by name, packed like the activations.
        loss: that mean loss; None if the hub does not have the labels.
    """

    TYPE = "gradient"
    round: int = checked(checks.integer(1))
    batch: int = checked(checks.integer())
    parts: dict[str, Array] = checked(checks.tensors)
    loss: float | None = checked(checks.optional(checks.number), None)


@dataclass(frozen=True)
class Move(Message):
    """Asks the device to go on with the bundle of another tier; it answers with ``ready``."""

    TYPE = "move"
    tier: str = checked(checks.text(128))
    manifest: str = checked(checks.sha256)
    reason: str = checked(checks.text())


@dataclass(frozen=True)
class Stop(Message):
    """The job is over.

    Attributes:
        reason: for people to read.
        state: sha256 of the final state; None if there is none to fetch.
        bases: sha256 of the final state of each base network by number, best first; None for a
            single model.
    """

    TYPE = "stop"
    reason: str = checked(checks.text())
    state: str | None = checked(checks.optional(checks.sha256), None)
    bases: dict[str, str] | None = checked(checks.optional(checks.states), None)


@dataclass(frozen=True)
class Answer(Message):
    """The hub's half of an answer.

    Attributes:
        request: the ``request`` of the ``infer``.
        heads: names of the heads that the hub holds, the model's own last.
        logits: their logits, float32 (heads, rows, classes), or (heads, rows, positions,
            vocabulary).
    """

    TYPE = "answer"
    request: int = checked(checks.integer(1))
    heads: list[str] = checked(checks.names)
    logits: Array = checked(checks.tensor)


@dataclass(frozen=True)
class Error(Message):
    """Tells the other side what it did wrong.

    Attributes:
        code: an :class:`ErrorCode`; text if a newer peer sent one that is not known here.
        message: for people to read.
        fatal: whether the session is over; the sender then closes the connection.
        field: the field or tensor that was wrong, if one was.
    """

    TYPE = "error"
    RELIABLE = False
    code: str = checked(checks.text(64))
    message: str = checked(checks.text())
    fatal: bool = checked(checks.flag)
    field: str | None = checked(checks.optional(checks.text(512)), None)


# --- both ways ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ack(Message):
    """Carries an acknowledgement when there is nothing else to send."""

    TYPE = "ack"
    RELIABLE = False


@dataclass(frozen=True)
class Piece(Message):
    """A piece of a message that is too long to travel in one frame.

    Attributes:
        data: bytes of ``[type, body]``, the next ones.
        last: whether the message is complete with it.
    """

    TYPE = "piece"
    EXTENSION = PIECES
    data: bytes = checked(checks.data)
    last: bool = checked(checks.flag, False)


MESSAGES: dict[str, type[Message]] = {
    cls.TYPE: cls
    for cls in (
        Hello, Ready, Decline, BlobGet, Activations, FeatureGradient, Update, Infer, Evaluated,
        Running, Bye, Welcome, Blob, Round, Features, Gradient, Evaluate, Move, Stop, Answer,
        Error, Ack, Piece,
    )
}  # fmt: skip


def from_body(kind: object, body: object, agreed: Collection[str] = ()) -> Message:
    """Build the message of type ``kind`` from its decoded body.

    Args:
        kind: the type.
        body: the body.
        agreed: the extensions that both sides speak. What belongs to another one is unknown.

    Raises:
        ProtocolError: unknown type, or a field that is unknown, missing or wrong.
    """
    return class_of(kind, agreed).from_body(body, agreed)


def class_of(kind: object, agreed: Collection[str] = ()) -> type[Message]:
    """The class of the messages of type ``kind``; raises :class:`ProtocolError` if unknown."""
    cls = MESSAGES.get(kind) if isinstance(kind, str) else None
    if cls is None or not cls.known_with(agreed):
        shown = repr(kind[:64]) if isinstance(kind, str) else f"of type {type(kind).__name__}"
        raise ProtocolError(ErrorCode.UNKNOWN_TYPE, f"unknown message type {shown}")
    return cls
