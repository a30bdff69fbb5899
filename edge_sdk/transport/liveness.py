"""Whether the other end of a WebSocket is alive: any byte that moves says so.

A ping waits behind the frame that is being sent, and so does the pong. On a slow link a long frame
takes longer than any time that a pong may take. So not the pong counts, but every byte, also one in
the middle of a frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import Connection
from websockets.protocol import State

PING_S = 15.0
"""Seconds from one ping to the next. Every side sends them, so that an idle peer is heard."""

DEAD_S = 45.0
"""Seconds without any byte after which a connection is dead: three pings."""

_UNSENT = 128 * 1024
"""Bytes that the system may hold for a connection beyond those that are on the wire. What is sent
next then goes out soon, also on a slow link."""


class Watched(Connection):
    """A WebSocket connection that is aborted when no byte moves for :data:`DEAD_S` seconds.

    A byte moves when it comes in. It also moves when it leaves the write buffer: bytes wait there
    only while the system has no room, and the system gets room when the peer takes what was sent.
    While this side reads nothing, because too much waits here, and has nothing to send, it cannot
    tell, and goes on.

    Args:
        args, options: see :class:`websockets.asyncio.connection.Connection`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._moved_at = 0.0
        self._pinged_at = 0.0
        self._waiting = 0  # bytes in the write buffer
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The TCP connection is there."""
        super().connection_made(transport)
        _send_soon(transport.get_extra_info("socket"))
        self._moved_at = self._pinged_at = self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """The TCP connection is gone."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        self._moved_at = self.loop.time()
        super().data_received(data)

    def send_data(self) -> None:
        """Write what the protocol has to send."""
        self._notice()
        super().send_data()
        self._waiting = self.transport.get_write_buffer_size()

    def _notice(self) -> None:
        """Notice bytes that left the write buffer. Only :meth:`send_data` puts any into it."""
        waiting = self.transport.get_write_buffer_size()
        if waiting < self._waiting:
            self._moved_at = self.loop.time()
        self._waiting = waiting

    def _look_later(self) -> None:
        # more often than pings are due, since one is sent only when this looks
        self._look = self.loop.call_later(PING_S / 3, self._check)

    def _check(self) -> None:
        self._notice()
        now = self.loop.time()
        if not self.transport.is_reading() and not self._waiting:
            self._moved_at = now
        if now - self._moved_at > DEAD_S:
            self.set_connection_exc(TimeoutError(f"not a byte moved for {DEAD_S:g} s"))
            self.transport.abort()
            return
        if now - self._pinged_at >= PING_S and self.protocol.state is State.OPEN:
            self._pinged_at = now
            if not self._waiting:  # behind what waits a ping would say nothing new
                self.protocol.send_ping(b"")
                self.send_data()
        self._look_later()


class WatchedClient(Watched, ClientConnection):
    """The device's end of a watched connection."""


def _send_soon(sock: Any) -> None:
    """Let the system take no more from a connection than it will send soon, where it can."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None:
        with contextlib.suppress(OSError, AttributeError):  # not over TCP
            sock.setsockopt(socket.IPPROTO_TCP, option, _UNSENT)
