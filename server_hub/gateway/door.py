"""The door: which connections may say hello, and what a connection may do below the protocol.

A *stranger* is a connection that has not said a valid hello. Strangers are bounded in all and per
address. Those above the bounds wait, in the order of their arrival, before the WebSocket handshake,
where they cost little. Nobody who waits takes the place of a device that is in. When the hub has no
room for one more connection, the address with most strangers loses its oldest one.
"""

from __future__ import annotations

import asyncio
import http
import ipaddress
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response

from edge_sdk.transport.flow import TokenBucket
from edge_sdk.transport.liveness import Watched
from server_hub.gateway.limits import HELLO_BYTES, Limits

MAX_FRAGMENTS = 256
"""Fragments of one message. Clients send whole messages; a fragment costs more than its bytes."""

PINGS_PER_S, PING_BURST = 1.0, 30.0
"""Pings that a connection may send. Every ping makes a pong, which waits until it is read."""

QUEUED_FRAMES = 2
"""Frames that are received and not decoded before a connection stops reading."""


class Connection(Watched, ServerConnection):
    """A connection at the door.

    It is aborted when it sends too many pings or a message in too many fragments, when its request
    takes too long, and when no byte moves any more.

    Args:
        door: the door.
        args, options: see :class:`websockets.asyncio.server.ServerConnection`.
    """

    def __init__(self, door: Door, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._door = door
        self._pings = TokenBucket(PINGS_PER_S, PING_BURST)
        self._fragments = 0
        self._overdue: asyncio.TimerHandle | None = None
        self.address = ""
        """Address that the connection counts for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The TCP connection is there."""
        super().connection_made(transport)
        self.address = network_of(str((self.remote_address or ("",))[0]))
        self._overdue = self.loop.call_later(self._door.limits.hello_s, self.abort)
        self._door.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The TCP connection is gone."""
        super().connection_lost(exc)
        self.requested()
        self._door.closed(self)

    def process_event(self, event: Any) -> None:
        """Process one event of the WebSocket protocol."""
        if isinstance(event, Frame):
            if event.opcode is Opcode.PING and not self._pings.try_take(self.loop.time()):
                self.abort()
                return
            if event.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
                self._fragments = 0 if event.fin else self._fragments + 1
                if self._fragments > MAX_FRAGMENTS:
                    self.abort()
                    return
        super().process_event(event)

    def requested(self) -> None:
        """The request is here; what follows has its own time."""
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def abort(self) -> None:
        """Close the TCP connection at once."""
        self.transport.abort()

    def admit(self) -> None:
        """A device has said a valid hello: it is no stranger, and may send large messages."""
        self.protocol.max_message_size = self._door.limits.max_frame
        self._door.admitted(self)


class Door:
    """Lets connections through to their hello.

    Args:
        limits: limits of a peer.
        room: largest number of open connections, strangers included.
        trusted: networks of proxies, whose ``X-Forwarded-For`` is believed.
    """

    def __init__(self, limits: Limits, room: int, trusted: Sequence[str] = ()) -> None:
        self.limits = limits
        self._room = room
        self._trusted = [ipaddress.ip_network(network) for network in trusted]
        self._devices: set[Connection] = set()
        self._strangers: dict[Connection, None] = {}  # in the order of their arrival
        self._inside: Counter[str] = Counter()  # strangers past the handshake, by address
        self._entered: dict[Connection, str] = {}
        self._waiting: deque[tuple[Connection, asyncio.Future[None]]] = deque()

    @property
    def strangers(self) -> int:
        """Number of connections without a valid hello."""
        return len(self._strangers)

    def opened(self, connection: Connection) -> None:
        """A connection was opened; if there is no room, a stranger loses its place."""
        self._strangers[connection] = None
        if len(self._strangers) + len(self._devices) > self._room:
            most, _ = Counter(c.address for c in self._strangers).most_common(1)[0]
            oldest = next(c for c in self._strangers if c.address == most)
            self.closed(oldest)
            oldest.abort()

    def closed(self, connection: Connection) -> None:
        """A connection was closed."""
        self._devices.discard(connection)
        self._strangers.pop(connection, None)
        self._leave(connection)

    def admitted(self, connection: Connection) -> None:
        """A connection has said a valid hello."""
        if self._strangers.pop(connection, self) is None:
            self._devices.add(connection)
        self._leave(connection)

    async def enter(self, connection: ServerConnection, request: Request) -> Response | None:
        """Wait for a place before the handshake; a response refuses the connection."""
        assert isinstance(connection, Connection)
        connection.requested()
        connection.address = self._address(connection.address, request)
        if not self._fits(connection.address):
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((connection, place))
            try:
                async with asyncio.timeout(self.limits.hello_s):
                    await place
            except TimeoutError:
                refusal: Response = connection.respond(
                    http.HTTPStatus.SERVICE_UNAVAILABLE, "The hub is busy; try later.\n"
                )
                return refusal
        elif connection in self._strangers:
            self._take(connection)
        return None

    def _fits(self, address: str) -> bool:
        return (
            len(self._entered) < self.limits.strangers
            and self._inside[address] < self.limits.strangers_per_address
        )

    def _take(self, connection: Connection) -> None:
        self._entered[connection] = connection.address
        self._inside[connection.address] += 1

    def _leave(self, connection: Connection) -> None:
        """Free a place, and give it to the first who waits and may have it."""
        address = self._entered.pop(connection, None)
        if address is not None:
            self._inside[address] -= 1
            if not self._inside[address]:
                del self._inside[address]
        still: list[tuple[Connection, asyncio.Future[None]]] = []
        while self._waiting and len(self._entered) < self.limits.strangers:
            waiting, place = self._waiting.popleft()
            if place.done() or waiting not in self._strangers:
                if not place.done():
                    place.set_result(None)  # its connection has gone; the handshake sees that
            elif self._fits(waiting.address):
                self._take(waiting)
                place.set_result(None)
            else:
                still.append((waiting, place))
        self._waiting.extendleft(reversed(still))

    def _address(self, peer: str, request: Request) -> str:
        """The address that a request came from: behind trusted proxies, the one they pass on."""
        hops = [
            hop.strip() for h in request.headers.get_all("X-Forwarded-For") for hop in h.split(",")
        ]
        while hops and self._is_trusted(peer):
            peer = network_of(hops.pop())
        return peer

    def _is_trusted(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_network(address)
        except ValueError:
            return False
        return any(ip.version == t.version and ip.subnet_of(t) for t in self._trusted)  # type: ignore[arg-type]


def network_of(address: str) -> str:
    """What an address counts for: itself, or of IPv6 the network of 64 bits that it lies in.

    A customer of a provider has at least such a network, and so 2^64 addresses.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


def serve_options(door: Door) -> dict[str, Any]:
    """Options of :func:`websockets.asyncio.server.serve` for connections that go by a door."""

    def connection(*args: Any, **options: Any) -> Connection:
        return Connection(door, *args, **options)

    return {
        "create_connection": connection,
        "process_request": door.enter,
        "max_size": HELLO_BYTES,
        "max_queue": QUEUED_FRAMES,
        "ping_interval": None,  # a watched connection pings
        "open_timeout": 3 * door.limits.hello_s,  # the request, the wait, the response
    }
