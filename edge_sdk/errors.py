"""Errors of Cutlayer. Every message says what was wrong, where, and what to do about it."""

from __future__ import annotations


class CutlayerError(Exception):
    """Base of every error that a user of Cutlayer can cause or meet."""


class ConfigError(CutlayerError):
    """A setting, an argument or a configuration file is wrong. Commands end with exit code 2."""


class DataError(CutlayerError):
    """Local examples do not fit the model: wrong shape, dtype, label or no examples at all."""


class BundleError(CutlayerError):
    """A bundle is missing, damaged, tampered with or from a newer format."""


class LinkClosed(CutlayerError):
    """The connection to the peer ended. A channel can be resumed over a new one."""


class HubError(CutlayerError):
    """The hub refused something and said why.

    Attributes:
        code: one of the codes in ``docs/protocol.md``.
        field: the field of the message that was wrong, if one was.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message if field is None else f"{message} (field {field!r})")
        self.code = code
        self.field = field


class ProtocolError(CutlayerError):
    """The peer broke the protocol; it is told so in an ``error`` message.

    Attributes:
        code: one of the codes in ``docs/protocol.md``.
        field: the field of the message that was wrong, if one was.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
