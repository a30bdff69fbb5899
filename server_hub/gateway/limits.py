"""Where the hub listens, and what a peer may do."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from edge_sdk.protocol.pieces import PIECE

HELLO_BYTES = 16 * 1024
"""Largest size of the first frame of a connection, in bytes."""


@dataclass(frozen=True)
class Listen:
    """Where the hub listens: the table ``[listen]``.

    Attributes:
        host: address of the interface; of IPv6 without brackets or in them.
        port: port; 0 takes a free one.
        trusted: addresses or networks of proxies. The hub believes their ``X-Forwarded-For``, and
            counts a connection for the address that a proxy passes on.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    trusted: tuple[str, ...] = ()

    @property
    def bracketed(self) -> str:
        """The host as it stands in a URL: an IPv6 address in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def __post_init__(self) -> None:
        if self.host.startswith("[") and self.host.endswith("]"):
            object.__setattr__(self, "host", self.host[1:-1])
        if not self.host:
            raise ValueError("host is empty; use 0.0.0.0, or :: with IPv6, for all interfaces")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, must be from 0 to 65535")
        for network in self.trusted:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(
                    f"trusted has {network!r}; write an address or a network, such as 10.0.0.0/8"
                ) from None


@dataclass(frozen=True)
class Limits:
    """What a peer may do: the table ``[limits]`` of ``hub.toml``.

    Attributes:
        max_frame: largest size of a frame, in bytes.
        max_message: largest size of a message that travels in pieces, in bytes.
        window: largest number of messages that a device may leave unacknowledged.
        session_s: seconds that a session without a connection is kept.
        hello_s: seconds that a new connection has for its handshake and its hello.
        connections: largest number of devices that are connected.
        strangers: largest number of connections whose hello is awaited. Further connections wait.
        strangers_per_address: the same for one address; of IPv6, for one network of 64 bits.
        blob_piece: size of one piece of a blob, in bytes.
        frames_per_s: frames that a device may send per second in the long run. A device that sends
            more has to wait.
        waiting_mb: MiB of frames that may wait for one device, to be sent or to be used. The hub
            reads nothing more from the device until less waits.
        total_waiting_mb: the same for all devices together.
        samples: largest number of examples that a device may say it has.
        samples_over_median: a device's examples count in averages and in the trunk's loss as at
            most this multiple of the median of the round's members.
    """

    max_frame: int = 64 * 2**20
    max_message: int = 128 * 2**20
    window: int = 16
    session_s: float = 60.0
    hello_s: float = 10.0
    connections: int = 4096
    strangers: int = 256
    strangers_per_address: int = 64
    blob_piece: int = 256 * 1024
    frames_per_s: float = 1000.0
    waiting_mb: int = 128
    total_waiting_mb: int = 2048
    samples: int = 1_000_000
    samples_over_median: float = 2.0

    @property
    def takes_pieces(self) -> bool:
        """Whether a piece of a message fits into a frame."""
        return self.max_frame >= 2 * PIECE

    def __post_init__(self) -> None:
        if self.window < 2 or self.max_frame < 2 * self.blob_piece:
            raise ValueError("window must be at least 2, max_frame at least twice blob_piece")
        for name in ("session_s", "hello_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0 and finite")
        for name in (
            "connections",
            "strangers",
            "strangers_per_address",
            "waiting_mb",
            "blob_piece",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.frames_per_s <= 0:
            raise ValueError(f"frames_per_s is {self.frames_per_s:g}, must be above 0")
        if self.total_waiting_mb < self.waiting_mb:
            raise ValueError("total_waiting_mb must be at least waiting_mb")
        if not 1024 <= self.max_message <= self.waiting_mb * 2**20:
            raise ValueError(
                f"max_message is {self.max_message}; it must be from 1024 to waiting_mb, "
                f"{self.waiting_mb} MiB"
            )
        if self.samples < 1 or not self.samples_over_median >= 1:
            raise ValueError("samples and samples_over_median must be at least 1")
