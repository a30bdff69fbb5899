"""Names and numbers that travel, as enums: activation modes, error codes, close codes."""

from __future__ import annotations

import enum


class ActivationMode(enum.StrEnum):
    """When a device sends activations in a round, and what comes back for them."""

    NONE = "none"
    """Never: the device trains alone."""
    TRAIN = "train"
    """From the training steps of the first epoch; nothing comes back."""
    FORWARD = "forward"
    """From a pass before training; nothing comes back."""
    RETURNED = "returned"
    """In every epoch; the device steps with the gradient that comes back, its heads rest."""
    FUSED = "fused"
    """In every epoch; the device joins the gradient that comes back with that of its heads."""
    U_SHAPED = "u_shaped"
    """In every epoch, without labels: features come back, then the gradient."""

    @property
    def returns_gradients(self) -> bool:
        """Whether a gradient comes back for every batch."""
        return self in (self.RETURNED, self.FUSED, self.U_SHAPED)


class ErrorCode(enum.StrEnum):
    """What ``error.code`` says; ``docs/protocol.md`` has the meanings in full.

    A newer peer may send a code that is not listed here. It stays text: see :meth:`parse`.
    """

    BAD_FRAME = "bad_frame"
    """Text instead of binary, not msgpack, not four elements, or a wrong ``seq`` or ``ack``."""
    FRAME_TOO_BIG = "frame_too_big"
    """The frame is larger than the receiver's limit."""
    UNKNOWN_TYPE = "unknown_type"
    """There is no message of this type."""
    BAD_MESSAGE = "bad_message"
    """A field is unknown, missing or wrong, or the message has no place here."""
    BAD_TENSOR = "bad_tensor"
    """A tensor is malformed, or differs from what the manifest says."""
    WINDOW_EXCEEDED = "window_exceeded"
    """More messages are unsettled than the window allows."""
    CANNOT_RESUME = "cannot_resume"
    """The two sides disagree about what was settled."""
    SEQUENCE_GAP = "sequence_gap"
    """A predecessor of the frame did not arrive. Not fatal: the session can be resumed."""
    UNSUPPORTED_VERSION = "unsupported_version"
    """The hub does not speak this version of the protocol."""
    BAD_TOKEN = "bad_token"
    """The token belongs to no device."""
    UNKNOWN_TIER = "unknown_tier"
    """There is no bundle for the tier, or neither ``welcome`` nor ``move`` named it."""
    BUSY = "busy"
    """The hub has no connections or no memory left, or it ends or restarts. Temporary."""
    REPLACED = "replaced"
    """Another connection came with the same token."""
    UNKNOWN_BLOB = "unknown_blob"
    """The blob is not, or no longer, at the hub. Not fatal."""
    BAD_LABELS = "bad_labels"
    """Labels of the wrong dtype, shape or range."""
    NOT_FINITE = "not_finite"
    """NaN or infinity in activations or parameters, or an input that the trunk cannot use."""
    INTERNAL = "internal"
    """The hub failed through no fault of the device. Temporary."""

    @property
    def is_fatal(self) -> bool:
        """Whether a sender ends the session with this code. A receiver reads ``error.fatal``."""
        return self not in (self.SEQUENCE_GAP, self.UNKNOWN_BLOB)

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later: a device goes on trying for a while."""
        return self in (self.BUSY, self.INTERNAL)

    @classmethod
    def parse(cls, code: str) -> ErrorCode | str:
        """The member with this value, or the text itself for a code that is not known."""
        try:
            return cls(code)
        except ValueError:
            return code


class CloseCode(enum.IntEnum):
    """Codes of WebSocket close frames (RFC 6455, section 7.4.1) that the protocol uses."""

    NORMAL = 1000
    """The sender needs the connection no longer; an ``error`` before it says why, if one was."""
    MESSAGE_TOO_BIG = 1009
    """A message exceeds the receiver's limit; same meaning as ``frame_too_big``."""
