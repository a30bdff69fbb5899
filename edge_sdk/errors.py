"""Errors of Cutlayer. Every message says what was wrong, where, and what to do about it."""

from __future__ import annotations

from edge_sdk.protocol.enums import ErrorCode


class CutlayerError(Exception):
    """Base of every error that a user of Cutlayer can cause or meet."""


class ConfigError(CutlayerError):
    """A setting, an argument or a configuration file is wrong. Commands end with exit code 2."""


class DataError(CutlayerError):
    """Local examples do not fit the model: wrong shape, dtype, label or no examples at all."""


class Diverged(CutlayerError):
    """Training has made the loss or a parameter infinite or not a number."""


class BundleError(CutlayerError):
    """A bundle is missing, damaged, tampered with or of another format."""


class LinkClosed(CutlayerError):
    """The connection to the peer ended. A channel can be resumed over a new one."""


class HubError(CutlayerError):
    """The hub refused something and said why.

    Attributes:
        code: an :class:`ErrorCode`; text if the hub sent a code that this version does not know.
        field: the field of the message that was wrong, if one was.
    """

    def __init__(self, code: ErrorCode | str, message: str, field: str | None = None) -> None:
        super().__init__(message if field is None else f"{message} (field {field!r})")
        self.code = ErrorCode.parse(code)
        self.field = field

    @property
    def is_temporary(self) -> bool:
        """Whether the same may succeed later."""
        return isinstance(self.code, ErrorCode) and self.code.is_temporary


class ProtocolError(CutlayerError):
    """The peer broke the protocol. An ``error`` message tells the peer what was wrong.

    Attributes:
        code: what was wrong, by kind.
        field: the field of the message, or the tensor, that was wrong, if one was.
    """

    def __init__(self, code: ErrorCode, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
