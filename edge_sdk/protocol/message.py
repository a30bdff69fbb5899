"""What all messages have in common: their fields, the checks of these, and extensions.

The protocol grows by *extensions*, which ``hello`` and ``welcome`` agree on. What belongs to one is
declared where it is: ``EXTENSION`` of a message, ``checked(..., extension=...)`` of a field.
Encoder and decoder get the extensions that a session has agreed on, and stop what is of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, Self

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode

EVALUATION = "evaluation"
"""The extension by which devices evaluate the model on examples that they keep back."""

PIECES = "pieces"
"""The extension by which long messages travel as a series of short ones."""

RECOUNT = "recount"
"""The extension by which a device says that the number of its examples has changed."""

RELEASE = "release"
"""The extension by which a hub rolls out releases, and a device says which one it runs."""

EXTENSIONS: tuple[str, ...] = (EVALUATION, PIECES, RECOUNT, RELEASE)
"""The extensions that this implementation speaks."""


class Message:
    """Base of all messages.

    Attributes:
        TYPE: the name of the message on the wire.
        RELIABLE: whether it carries a sequence number and is delivered exactly once.
        EXTENSION: the extension that the message belongs to; None for one that all peers know.
    """

    TYPE: ClassVar[str]
    RELIABLE: ClassVar[bool] = True
    EXTENSION: ClassVar[str | None] = None

    def body(self, agreed: Collection[str] = ()) -> dict[str, Any]:
        """The map that travels. Fields that have their default are left out.

        Args:
            agreed: the extensions that both sides speak.

        Raises:
            ProtocolError: the message, or a field that is not its default, belongs to another one.
                Look at the session's ``extensions`` before you send it.
        """
        body = {}
        _check_agreed(self.TYPE, self.EXTENSION, agreed)
        for f in _fields(type(self)).values():
            value = getattr(self, f.name)
            if value is f.default or (type(value) is type(f.default) and value == f.default):
                continue
            _check_agreed(f"{self.TYPE}.{f.name}", f.metadata["extension"], agreed)
            body[f.name] = value
        return body

    @classmethod
    def from_body(cls, body: object, agreed: Collection[str] = ()) -> Self:
        """Build the message from its decoded body.

        Args:
            body: the map that came.
            agreed: the extensions that both sides speak; a field of another one is unknown.

        Raises:
            ProtocolError: a field that is unknown, missing or wrong.
        """
        if not isinstance(body, dict):
            raise ProtocolError(ErrorCode.BAD_MESSAGE, f"the body of {cls.TYPE} must be a map")
        fields = _fields(cls)
        for name in body:
            if name not in fields or not _speaks(fields[name].metadata["extension"], agreed):
                shown = str(name)[:64]
                raise ProtocolError(
                    ErrorCode.BAD_MESSAGE, f"{cls.TYPE} has no field {shown!r}", shown
                )
        for name, spec in fields.items():
            if name not in body:
                if spec.default is dataclasses.MISSING:
                    raise ProtocolError(
                        ErrorCode.BAD_MESSAGE, f"{cls.TYPE} lacks the field {name!r}", name
                    )
                continue
            wanted = spec.metadata["check"](body[name])
            if wanted is not None:
                raise ProtocolError(
                    ErrorCode.BAD_MESSAGE, f"{cls.TYPE}.{name} must be {wanted}", name
                )
        return cls(**body)

    @classmethod
    def known_with(cls, agreed: Collection[str]) -> bool:
        """Whether peers that have agreed on these extensions know the message."""
        return _speaks(cls.EXTENSION, agreed)


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a message class, by name."""
    return {f.name: f for f in dataclasses.fields(cls)}


def _speaks(extension: str | None, agreed: Collection[str]) -> bool:
    return extension is None or extension in agreed


def _check_agreed(what: str, extension: str | None, agreed: Collection[str]) -> None:
    """Raise if something of an extension is about to be sent to a peer that does not speak it."""
    if not _speaks(extension, agreed):
        raise ProtocolError(
            ErrorCode.INTERNAL,
            f"{what} belongs to the extension {extension!r}, which the peer does not speak",
        )
