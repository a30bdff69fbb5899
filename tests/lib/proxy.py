"""A proxy between devices and a hub that sees every frame and may change it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

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
