"""Tokens: one per device, stored as sha256, revoked by removing the device.

A token is 256 random bits, so that a plain hash is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path

from edge_sdk.bundle import write_atomically
from edge_sdk.config import read_toml
from edge_sdk.errors import ConfigError


class TokenFile:
    """A TOML file with a table ``[devices]`` from device name to ``sha256:...``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """Hashes by device name. Raises :class:`ConfigError`."""
        if not self.path.exists():
            raise ConfigError(
                f"no tokens at {self.path}; make one with: "
                f"cutlayer token new DEVICE --tokens {self.path}"
            )
        devices = read_toml(self.path).get("devices")
        if not isinstance(devices, dict) or not all(isinstance(v, str) for v in devices.values()):
            raise ConfigError(f"{self.path} needs a table [devices] of name = 'sha256:...'")
        return devices

    def allows(self, device: str, token: str) -> bool:
        """Whether ``token`` is the device's. Reads the file, so that a revocation counts now."""
        stored = self.read().get(device, "")
        return hmac.compare_digest(stored.encode(), _digest(token).encode())

    def issue(self, device: str) -> str:
        """A new token for a device, in place of any it had. Only its hash is stored."""
        devices = self.read() if self.path.exists() else {}
        token = secrets.token_hex(32)
        self._write({**devices, device: _digest(token)})
        return token

    def revoke(self, device: str) -> None:
        """Remove a device's token. Raises :class:`ConfigError` if it has none."""
        devices = self.read()
        if device not in devices:
            raise ConfigError(f"{self.path} has no device {device!r}")
        self._write({name: digest for name, digest in devices.items() if name != device})

    def _write(self, devices: dict[str, str]) -> None:
        lines = [f"{_quoted(name)} = {_quoted(devices[name])}" for name in sorted(devices)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "\n".join(["[devices]", *lines, ""]).encode())


def _quoted(text: str) -> str:
    """A TOML string. JSON's, but for surrogate pairs and DEL, which TOML does not allow."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
