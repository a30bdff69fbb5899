"""Bytes that go up from devices and down to them, by kind of message."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes by kind of message, as the hub sees them.

    Attributes:
        up: bytes from devices.
        down: bytes to devices.
    """

    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, received: int, sent: int) -> None:
        """Add the bytes of a frame."""
        self.up[kind] = self.up.get(kind, 0) + received
        self.down[kind] = self.down.get(kind, 0) + sent

    def by_kind(self) -> dict[str, dict[str, int]]:
        """``{kind: {"up": bytes, "down": bytes}}``."""
        return {
            kind: {"up": self.up.get(kind, 0), "down": self.down.get(kind, 0)}
            for kind in sorted(self.up.keys() | self.down.keys())
        }
