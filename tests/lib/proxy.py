"""What may lie between devices and a hub: a proxy that changes frames, and a slow network."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from edge_sdk.protocol.messages import SUBPROTOCOL

Filter = Callable[[bytes], bytes]
"""A function from a received frame to the frame that is passed on."""


def unchanged(frame: bytes) -> bytes:
    """Return the frame unchanged."""
    return frame


@asynccontextmanager
async def proxy(url: str, up: Filter = unchanged, down: Filter = unchanged) -> AsyncIterator[str]:
    """Pass frames on between a hub and whoever connects to the address that this yields.

    Args:
        url: address of the hub.
        up: applied to each frame of a device.
        down: applied to each frame of the hub.
    """

    async def carry(
        source: ClientConnection | ServerConnection,
        sink: ClientConnection | ServerConnection,
        change: Filter,
    ) -> None:
        try:
            async for frame in source:
                assert isinstance(frame, bytes)
                await sink.send(change(frame))
        except ConnectionClosed:
            pass
        await sink.close()

    async def serve_device(device: ServerConnection) -> None:
        async with connect(
            url,
            subprotocols=[SUBPROTOCOL],
            compression=None,
            max_size=None,  # type: ignore[list-item]
        ) as hub:
            await asyncio.gather(carry(device, hub, up), carry(hub, device, down))

    server = await serve(
        serve_device,
        "127.0.0.1",
        0,
        subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        compression=None,
        max_size=None,
    )
    try:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@dataclass
class Relay:
    """A slow network: bytes of TCP connections, passed on at a rate and with a delay.

    Attributes:
        url: address that devices connect to.
        up: bytes per second from devices to the hub.
        down: bytes per second from the hub to devices.
        latency: seconds that a byte takes in one direction.
        blocked: directions that pass nothing on and say nothing about it, "up" or "down".
        connections: number of connections so far.
        passed: bytes passed on so far, by direction.
    """

    url: str
    up: float = math.inf
    down: float = math.inf
    latency: float = 0.0
    blocked: set[str] = field(default_factory=set)
    connections: int = 0
    passed: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Break all connections; what is under way is lost."""
        for writer in self.writers:
            writer.transport.abort()

    async def carry(
        self, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Pass on one direction of a connection until it breaks."""
        rate = self.up if direction == "up" else self.down
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(due - loop.time())
                self.passed[direction] += len(data)
                sink.write(data)
                await sink.drain()
                if not data:
                    return sink.close()

        arriving = asyncio.create_task(arrive())
        free_at = asked_at = loop.time()
        try:
            while data := await source.read(int(max(1460, min(rate / 50, 65536)))):
                if loop.time() - asked_at > 0.001:  # nothing was there to be sent
                    free_at = max(free_at, loop.time())
                free_at += len(data) / rate  # also if this task was late: a network is not
                await asyncio.sleep(free_at - loop.time())
                while direction in self.blocked:
                    await asyncio.sleep(0.05)
                under_way.put_nowait((free_at + self.latency, data))
                asked_at = loop.time()
            under_way.put_nowait((loop.time() + self.latency, b""))
            await arriving
        finally:
            arriving.cancel()


@asynccontextmanager
async def relay(
    url: str, up: float = math.inf, down: float = math.inf, latency: float = 0.0
) -> AsyncIterator[Relay]:
    """Put a slow network before the hub at ``url``; the arguments are those of :class:`Relay`."""
    port = int(url.rpartition(":")[2])
    made = Relay("", up, down, latency)
    rates = [rate for rate in (up, down) if rate < math.inf]
    # what a network holds for about 0.1 s
    buffer = int(max([2**15, *(rate / 10 for rate in rates)])) if rates else 2**18
    tasks: set[asyncio.Task[None]] = set()

    async def serve_device(
        from_device: asyncio.StreamReader, to_device: asyncio.StreamWriter
    ) -> None:
        made.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers = {to_device}
        try:
            from_hub, to_hub = await asyncio.open_connection(
                sock=await _connected(port, buffer), limit=buffer
            )
            writers.add(to_hub)
            made.writers |= writers
            await asyncio.gather(
                made.carry("up", from_device, to_hub), made.carry("down", from_hub, to_device)
            )
        except (OSError, asyncio.CancelledError):
            pass  # an end has gone, or the test is over
        finally:
            made.writers -= writers
            tasks.discard(task)
            for writer in writers:
                writer.transport.abort()

    listening = _with_buffers(buffer)
    listening.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(serve_device, sock=listening, limit=buffer)
    made.url = f"ws://127.0.0.1:{listening.getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _with_buffers(size: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return made


async def _connected(port: int, buffer: int) -> socket.socket:
    made = _with_buffers(buffer)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    return made
