"""Tokens: each device has one, which authenticates it. The hub stores only the SHA-256 of a token.

A token is 256 random bits, which nobody can guess. A plain hash without salt is therefore enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_sdk.bundle.store import write_atomically
from edge_sdk.config import read_toml
from edge_sdk.errors import ConfigError
from edge_sdk.files import check_name, naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("cutlayer.hub")


class Tokens(Protocol):
    """Tells which device a token belongs to."""

    def device_of(self, token: str) -> str | None:
        """Return the name of the device with this token; None if no device has it."""

    def tier_of(self, device: str) -> str | None:
        """Return the tier that a device's token was issued for; None if for no tier."""


@dataclass(frozen=True)
class _Table:
    """The token file as it was read.

    Attributes:
        stamp: what of the file changes when it is written.
        devices: hash by device name.
        tiers: tier by device name.
        names: device name by hash.
    """

    stamp: tuple[int, ...]
    devices: dict[str, str]
    tiers: dict[str, str]
    names: dict[str, str]


class TokenFile:
    """A TOML file with a table ``[devices]`` from device name to ``sha256:...``.

    A second table ``[tiers]`` has the tier of each token that was issued for a tier. The file is
    read again whenever it has changed, so a revocation takes effect at once.

    Args:
        path: path of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table: _Table | None = None
        self._broken: tuple[int, ...] | None = None

    def read(self) -> dict[str, str]:
        """Return the hashes by device name.

        Raises:
            ConfigError: the file does not exist, or is invalid.
        """
        return dict(self._read().devices)

    def device_of(self, token: str) -> str | None:
        """Return the name of the device with this token; None if no device has it.

        A file that has become invalid, or is gone, is reported once in the log; the tokens that
        were read last stay valid until it can be read again.

        Raises:
            ConfigError: the file has never been valid since the hub started.
        """
        # the time of the lookup depends on the hash, which tells nothing about the token
        return self._present().names.get(_digest(token))

    def tier_of(self, device: str) -> str | None:
        """Return the tier that a device's token was issued for; None if for no tier.

        Raises:
            ConfigError: the file has never been valid since the hub started.
        """
        return self._present().tiers.get(device)

    def issue(self, device: str, tier: str | None = None) -> str:
        """Make a new token for a device, which replaces an earlier one, and store its hash.

        Args:
            device: name of the device.
            tier: tier of the device; None if the device names its own.

        Returns:
            The token, 64 hexadecimal digits.

        Raises:
            ConfigError: the file is invalid, or the name cannot be shown or sent.
        """
        check_name(device, "device")
        if tier is not None:
            check_name(tier, "tier")
        with self._lock():
            devices, tiers = self._tables() if self.path.exists() else ({}, {})
            token = secrets.token_hex(32)
            tiers.pop(device, None)
            if tier:
                tiers[device] = tier
            self._write({**devices, device: _digest(token)}, tiers)
        return token

    def revoke(self, device: str) -> None:
        """Remove a device's token.

        Raises:
            ConfigError: the device has no token, or the file is invalid.
        """
        with self._lock():
            devices, tiers = self._tables()
            if device not in devices:
                raise ConfigError(f"{self.path} has no device {device!r}")
            del devices[device]
            tiers.pop(device, None)
            self._write(devices, tiers)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep other processes from changing the file meanwhile."""
        folder = self.path.absolute().parent
        with naming(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _present(self) -> _Table:
        """The tables as they are now, or as they were when the file could be read last."""
        try:
            stamp = self._stamp()
            if self._table is None or stamp not in (self._table.stamp, self._broken):
                self._table, self._broken = self._read(), None
        except ConfigError as error:
            if self._table is None:
                raise
            if self._broken is None:
                log.error("the token file cannot be used, its last content stays valid: %s", error)
            self._broken = stamp
        return self._table

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> _Table:
        stamp = self._stamp()
        devices, tiers = self._tables()
        return _Table(stamp, devices, tiers, {digest: name for name, digest in devices.items()})

    def _tables(self) -> tuple[dict[str, str], dict[str, str]]:
        """The tables ``[devices]`` and ``[tiers]`` of the file."""
        if not self.path.exists():
            raise ConfigError(
                f"no tokens at {self.path}; make one with: "
                f"cutlayer token new DEVICE --tokens {self.path}"
            )
        content = read_toml(self.path)
        found = []
        for name, missing in (("devices", None), ("tiers", {})):
            table = content.get(name, missing)
            if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
                what = "name = 'sha256:...'" if name == "devices" else "name = 'TIER'"
                raise ConfigError(f"{self.path} needs a table [{name}] of {what}")
            for device in table:
                check_name(device, f"{self.path}: device")
            found.append(dict(table))
        return found[0], found[1]

    def _write(self, devices: dict[str, str], tiers: dict[str, str]) -> None:
        lines = []
        for name, table in (("devices", devices), ("tiers", tiers)):
            if table or name == "devices":
                lines += [
                    f"[{name}]",
                    *(f"{_quoted(k)} = {_quoted(table[k])}" for k in sorted(table)),
                ]
        write_atomically(self.path, "\n".join([*lines, ""]).encode())


def _quoted(text: str) -> str:
    """Return a TOML string.

    It is the JSON string, without surrogate pairs and DEL, which TOML does not allow.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
