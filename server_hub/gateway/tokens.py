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
from dataclasses import dataclass, field
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

    def is_download_only(self, device: str) -> bool:
        """Return whether a device's token only downloads."""


@dataclass
class _Content:
    """What the token file says.

    Attributes:
        devices: hash by device name.
        tiers: tier by device name.
        download_only: names of the devices whose token only downloads.
    """

    devices: dict[str, str] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)
    download_only: set[str] = field(default_factory=set)

    def remove(self, device: str) -> None:
        """Remove all that the file says of a device."""
        self.devices.pop(device, None)
        self.tiers.pop(device, None)
        self.download_only.discard(device)

    def to_toml(self) -> str:
        """Return the content of the file."""
        lines = []
        if self.download_only:
            names = (f"    {_quoted(name)}," for name in sorted(self.download_only))
            lines += ["download_only = [", *names, "]"]
        for name, table in (("devices", self.devices), ("tiers", self.tiers)):
            if table or name == "devices":
                lines.append(f"[{name}]")
                lines += (f"{_quoted(k)} = {_quoted(table[k])}" for k in sorted(table))
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class _Read:
    """The token file as it was read.

    Attributes:
        stamp: what of the file changes when it is written.
        content: its content.
        names: device name by hash.
    """

    stamp: tuple[int, ...]
    content: _Content
    names: dict[str, str]


class TokenFile:
    """A TOML file with a table ``[devices]`` from device name to ``sha256:...``.

    A second table ``[tiers]`` has the tier of each token that was issued for a tier, and the list
    ``download_only`` the devices whose token only downloads. The file is read again whenever it has
    changed, so a revocation takes effect at once.

    Args:
        path: path of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table: _Read | None = None
        self._broken: tuple[int, ...] | None = None

    def read(self) -> dict[str, str]:
        """Return the hashes by device name.

        Raises:
            ConfigError: the file does not exist, or is invalid.
        """
        return dict(self._content().devices)

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
        return self._present().content.tiers.get(device)

    def is_download_only(self, device: str) -> bool:
        """Return whether a device's token only downloads.

        Raises:
            ConfigError: the file has never been valid since the hub started.
        """
        return device in self._present().content.download_only

    def issue(self, device: str, tier: str | None = None, *, download_only: bool = False) -> str:
        """Make a new token for a device, which replaces an earlier one, and store its hash.

        Args:
            device: name of the device.
            tier: tier of the device; None if the device names its own.
            download_only: whether the device may only download bundles, and neither train nor ask.

        Returns:
            The token, 64 hexadecimal digits.

        Raises:
            ConfigError: the file is invalid, or the name cannot be shown or sent.
        """
        check_name(device, "device")
        if tier is not None:
            check_name(tier, "tier")
        with self._lock():
            content = self._content() if self.path.exists() else _Content()
            token = secrets.token_hex(32)
            content.remove(device)
            content.devices[device] = _digest(token)
            if tier:
                content.tiers[device] = tier
            if download_only:
                content.download_only.add(device)
            write_atomically(self.path, content.to_toml().encode())
        return token

    def revoke(self, device: str) -> None:
        """Remove a device's token.

        Raises:
            ConfigError: the device has no token, or the file is invalid.
        """
        with self._lock():
            content = self._content()
            if device not in content.devices:
                raise ConfigError(f"{self.path} has no device {device!r}")
            content.remove(device)
            write_atomically(self.path, content.to_toml().encode())

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

    def _present(self) -> _Read:
        """The content as it is now, or as it was when the file could be read last."""
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

    def _read(self) -> _Read:
        stamp, content = self._stamp(), self._content()
        return _Read(stamp, content, {digest: name for name, digest in content.devices.items()})

    def _content(self) -> _Content:
        """What the file says; :class:`ConfigError` if it is invalid or does not exist."""
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
        download_only = content.get("download_only", [])
        if not isinstance(download_only, list):
            raise ConfigError(f"{self.path}: download_only must be a list of names of devices")
        for device in download_only:
            if device not in found[0]:
                raise ConfigError(
                    f"{self.path}: download_only names {device!r}, which has no token"
                )
        return _Content(found[0], found[1], set(download_only))


def _quoted(text: str) -> str:
    """Return a TOML string.

    It is the JSON string, without surrogate pairs and DEL, which TOML does not allow.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
