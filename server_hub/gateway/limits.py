"""Where the hub listens, and what a peer may do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Listen:
    """Where the hub listens: the table ``[listen]``. Port 0 takes a free port."""

    host: str = "127.0.0.1"
    port: int = 8765

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, must be from 0 to 65535")


@dataclass(frozen=True)
class Limits:
    """What a peer may do: the table ``[limits]`` of ``hub.toml``.

    Attributes:
        max_frame: largest size of a frame, in bytes.
        window: largest number of messages that a device may leave unacknowledged.
        session_s: seconds that a session without a connection is kept.
        hello_s: seconds that a new connection has for its hello.
        connections: largest number of open connections.
        blob_piece: size of one piece of a blob, in bytes.
    """

    max_frame: int = 64 * 2**20
    window: int = 16
    session_s: float = 60.0
    hello_s: float = 10.0
    connections: int = 1024
    blob_piece: int = 256 * 1024

    def __post_init__(self) -> None:
        if self.window < 2 or self.max_frame < 2 * self.blob_piece:
            raise ValueError("window must be at least 2, max_frame at least twice blob_piece")
