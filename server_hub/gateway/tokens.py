"""Tokens: each device has one, which authenticates it. The hub stores only the SHA-256 of a token.

A token is 256 random bits, which nobody can guess. A plain hash without salt is therefore enough.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path
from typing import Protocol

from edge_sdk.bundle.store import write_atomically
from edge_sdk.config import read_toml
from edge_sdk.errors import ConfigError


class Tokens(Protocol):
    """Tells which device a token belongs to."""

    def device_of(self, token: str) -> str | None:
        """Return the name of the device with this token; None if no device has it."""

    def tier_of(self, device: str) -> str | None:
        """Return the tier that a device's token was issued for; None if for no tier."""


class TokenFile:
    """A TOML file with a table ``[devices]`` from device name to ``sha256:...``.

    A second table ``[tiers]`` has the tier of each token that was issued for a tier.

    Args:
        path: path of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """Return the hashes by device name.

        Raises:
            ConfigError: the file does not exist, or is invalid.
        """
        if not self.path.exists():
            raise ConfigError(
                f"no tokens at {self.path}; make one with: "
                f"cutlayer token new DEVICE --tokens {self.path}"
            )
        return self._table("devices", needed=True)

    def device_of(self, token: str) -> str | None:
        """Return the name of the device with this token; None if no device has it.

        The method reads the file, so that a revocation takes effect at once.

        Raises:
            ConfigError: the file does not exist, or is invalid.
        """
        digest = _digest(token).encode()
        found = None
        for device, stored in self.read().items():  # compare all, so that the time reveals nothing
            if hmac.compare_digest(stored.encode(), digest):
                found = device
        return found

    def tier_of(self, device: str) -> str | None:
        """Return the tier that a device's token was issued for; None if for no tier.

        Raises:
            ConfigError: the file is invalid.
        """
        return self._table("tiers", needed=False).get(device)

    def issue(self, device: str, tier: str | None = None) -> str:
        """Make a new token for a device, which replaces an earlier one, and store its hash.

        Args:
            device: name of the device.
            tier: tier of the device; None if the device names its own.

        Returns:
            The token, 64 hexadecimal digits.

        Raises:
            ConfigError: the file is invalid.
        """
        devices = self.read() if self.path.exists() else {}
        tiers = self._table("tiers", needed=False) if self.path.exists() else {}
        token = secrets.token_hex(32)
        tiers.pop(device, None)
        self._write({**devices, device: _digest(token)}, {**tiers, device: tier} if tier else tiers)
        return token

    def revoke(self, device: str) -> None:
        """Remove a device's token.

        Raises:
            ConfigError: the device has no token, or the file is invalid.
        """
        devices = self.read()
        if device not in devices:
            raise ConfigError(f"{self.path} has no device {device!r}")
        tiers = self._table("tiers", needed=False)
        tiers.pop(device, None)
        self._write({name: digest for name, digest in devices.items() if name != device}, tiers)

    def _table(self, name: str, needed: bool) -> dict[str, str]:
        table = read_toml(self.path).get(name, None if needed else {})
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            what = "name = 'sha256:...'" if name == "devices" else "name = 'TIER'"
            raise ConfigError(f"{self.path} needs a table [{name}] of {what}")
        return table

    def _write(self, devices: dict[str, str], tiers: dict[str, str]) -> None:
        lines = []
        for name, table in (("devices", devices), ("tiers", tiers)):
            if table or name == "devices":
                lines += [
                    f"[{name}]",
                    *(f"{_quoted(k)} = {_quoted(table[k])}" for k in sorted(table)),
                ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "\n".join([*lines, ""]).encode())


def _quoted(text: str) -> str:
    """Return a TOML string.

    It is the JSON string, without surrogate pairs and DEL, which TOML does not allow.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
