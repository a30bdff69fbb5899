"""Links carry frames between a device and a hub: a websocket, or two queues in memory."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Protocol
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidURI,
    ProxyError,
)

from edge_sdk.errors import ConfigError, LinkClosed
from edge_sdk.protocol.enums import CloseCode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.messages import SUBPROTOCOL
from edge_sdk.transport.liveness import WatchedClient


class Link(Protocol):
    """Carries frames in order until it breaks."""

    async def send(self, frame: bytes) -> None:
        """Send one frame; raises :class:`LinkClosed`."""

    async def receive(self) -> bytes | str:
        """The next frame; raises :class:`LinkClosed` when there will be none."""

    async def close(self) -> None:
        """Close the link; closing twice does nothing."""


class WebSocketLink:
    """A link over a websocket, either end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def send(self, frame: bytes) -> None:
        try:
            await self._connection.send(frame)
        except ConnectionClosed as error:
            raise LinkClosed(f"the connection closed: {_reason(error)}") from error

    async def receive(self) -> bytes | str:
        try:
            return await self._connection.recv()
        except ConnectionClosed as error:
            raise LinkClosed(f"the connection closed: {_reason(error)}") from error

    async def close(self) -> None:
        await self._connection.close(CloseCode.NORMAL)


def _reason(error: ConnectionClosed) -> BaseException:
    """Why a connection closed: nothing moved any more, or what the close frames say."""
    return error.__cause__ if isinstance(error.__cause__, TimeoutError) else error


async def open_websocket(url: str, max_frame: int = DEFAULT_MAX_FRAME) -> WebSocketLink:
    """Connect to a hub at ``ws://`` or ``wss://``.

    The connection goes through the proxy that the environment names, see ``docs/device.md``; to
    this machine itself it goes directly.

    Raises:
        ConfigError: the URL is not one, or the proxy cannot be used.
        LinkClosed: nothing answers there, or not with this protocol; trying again may help.
    """
    here = _is_here(url)
    try:
        connection = await connect(
            url,
            proxy=None if here else True,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            max_size=max_frame,
            open_timeout=10,
            ping_interval=None,  # a watched connection pings
            create_connection=WatchedClient,
        )
    except InvalidURI as error:
        raise _no_address(url) from error
    except (InvalidProxy, ImportError, ValueError) as error:
        raise ConfigError(
            f"the proxy that the environment names cannot be used: {error}; change HTTPS_PROXY or "
            "HTTP_PROXY, or list the hub in NO_PROXY"
        ) from error
    except ProxyError as error:
        raise LinkClosed(f"cannot connect to {url} through the proxy: {error}") from error
    except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed, EOFError) as error:
        raise LinkClosed(f"cannot connect to {url}: {error}") from error
    if connection.subprotocol != SUBPROTOCOL:
        await connection.close()
        raise LinkClosed(f"{url} does not speak {SUBPROTOCOL}")
    return WebSocketLink(connection)


def _is_here(url: str) -> bool:
    """Whether an address is on this machine, which no proxy is needed for.

    Raises:
        ConfigError: it is no address.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        valid = parts.port != 0 and not any(c.isspace() for c in url)
        host.encode("idna")
    except ValueError:  # a port that is no number, brackets that do not close, a name too long
        valid = False
    if not valid:
        raise _no_address(url)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _no_address(url: str) -> ConfigError:
    return ConfigError(
        f"{url!r} is not a websocket address; use ws://HOST:PORT, and brackets around an IPv6 "
        "address: ws://[::1]:8765"
    )


class MemoryLink:
    """One end of a link in memory; :meth:`pair` makes both."""

    def __init__(
        self, outgoing: asyncio.Queue[bytes | None], incoming: asyncio.Queue[bytes | None]
    ):
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False

    @classmethod
    def pair(cls) -> tuple[MemoryLink, MemoryLink]:
        """Two connected ends. What is in flight is bounded by the channel's window."""
        there: asyncio.Queue[bytes | None] = asyncio.Queue()
        back: asyncio.Queue[bytes | None] = asyncio.Queue()
        return cls(there, back), cls(back, there)

    async def send(self, frame: bytes) -> None:
        if self._closed:
            raise LinkClosed("the link was closed")
        await asyncio.sleep(0)
        self._outgoing.put_nowait(frame)

    async def receive(self) -> bytes | str:
        frame = None if self._closed else await self._incoming.get()
        if frame is None:
            self._closed = True
            raise LinkClosed("the link was closed")
        return frame

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.put_nowait(None)
            self._incoming.put_nowait(None)  # wakes a receive() of our own
