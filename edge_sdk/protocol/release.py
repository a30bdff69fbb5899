"""The message of the extension ``release``: a device says which bundle it runs."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.protocol import checks
from edge_sdk.protocol.checks import checked
from edge_sdk.protocol.message import RELEASE, Message


@dataclass(frozen=True)
class Running(Message):
    """The bundle that the device answers with, after it has tried the one of ``welcome``.

    Attributes:
        manifest: sha256 of the manifest of the bundle that is loaded; None if there is none.
        refused: sha256 of the manifest of the release that failed the device's own check; None if
            none did.
        reason: why it failed, for people to read; None if none did.
    """

    TYPE = "running"
    EXTENSION = RELEASE
    manifest: str | None = checked(checks.optional(checks.sha256), None)
    refused: str | None = checked(checks.optional(checks.sha256), None)
    reason: str | None = checked(checks.optional(checks.text()), None)
