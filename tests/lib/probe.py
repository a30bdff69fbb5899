"""An extension that exists in tests only: one message, and one field of another message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from edge_sdk.protocol import checks
from edge_sdk.protocol.checks import checked
from edge_sdk.protocol.messages import MESSAGES, Message

PROBE = "probe"


@dataclass(frozen=True)
class Probe(Message):
    """A message of the extension."""

    TYPE = "probe"
    EXTENSION = PROBE
    number: int = checked(checks.integer())


@dataclass(frozen=True)
class Noted(Message):
    """A message that all peers know, with fields of the extension."""

    TYPE = "noted"
    text: str = checked(checks.text())
    note: str | None = checked(checks.optional(checks.text()), None, extension=PROBE)
    weight: float = checked(checks.number, 0.5, extension=PROBE)


@contextmanager
def probing() -> Iterator[None]:
    """The protocol has these messages while entered."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (Probe, Noted):
            patch.setitem(MESSAGES, cls.TYPE, cls)
        yield
