"""Tokens: one per device, which says who it is; stored as sha256, revoked by removing it.

A token is 256 random bits, so that a plain hash is enough: there is nothing to guess.
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
    """Says which device a token is of."""

    def device_of(self, token: str) -> str | None:
        """The device whose token this is; None if it is nobody's."""

    def tier_of(self, device: str) -> str | None:
        """The tier that a device's token was issued for, if it was for one."""


class TokenFile:
    """A TOML file with a table ``[devices]`` from device name to ``sha256:...``.

    A second table, ``[tiers]``, may say which tier a device's token was issued for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """Hashes by device name. Raises :class:`ConfigError`."""
        if not self.path.exists():
            raise ConfigError(
                f"no tokens at {self.path}; make one with: "
                f"cutlayer token new DEVICE --tokens {self.path}"
            )
        return self._table("devices", needed=True)

    def device_of(self, token: str) -> str | None:
        """The device whose token this is. Reads the file, so that a revocation counts now."""
        digest = _digest(token).encode()
        found = None
        for device, stored in self.read().items():  # all of them, however early one matches
            if hmac.compare_digest(stored.encode(), digest):
                found = device
        return found

    def tier_of(self, device: str) -> str | None:
        """The tier that a device's token was issued for, if it was for one."""
        return self._table("tiers", needed=False).get(device)

    def issue(self, device: str, tier: str | None = None) -> str:
        """A new token for a device, in place of any it had. Only its hash is stored."""
        devices = self.read() if self.path.exists() else {}
        tiers = self._table("tiers", needed=False) if self.path.exists() else {}
        token = secrets.token_hex(32)
        tiers.pop(device, None)
        self._write({**devices, device: _digest(token)}, {**tiers, device: tier} if tier else tiers)
        return token

    def revoke(self, device: str) -> None:
        """Remove a device's token. Raises :class:`ConfigError` if it has none."""
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
    """A TOML string. JSON's, but for surrogate pairs and DEL, which TOML does not allow."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
