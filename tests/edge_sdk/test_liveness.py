"""A connection is alive as long as bytes move, and dead when none do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from edge_sdk.errors import LinkClosed
from edge_sdk.protocol.messages import SUBPROTOCOL
from edge_sdk.transport import liveness
from edge_sdk.transport.link import WebSocketLink, open_websocket
from server_hub.gateway.door import Connection, Door, serve_options
from server_hub.gateway.limits import Limits
from tests.lib.proxy import Relay, relay
from tests.lib.tasks import run

DEAD_S = 0.6


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings every 0.1 s, and 0.6 s of silence are the end."""
    monkeypatch.setattr(liveness, "PING_S", 0.1)
    monkeypatch.setattr(liveness, "DEAD_S", DEAD_S)


class Ends:
    """Both ends of a connection over a slow network."""

    def __init__(self, device: ClientConnection, hub: ServerConnection, network: Relay) -> None:
        self.device, self.hub, self.network = device, hub, network


@asynccontextmanager
async def ends(
    up: float = 1e9, down: float = 1e9, device_end: type[ClientConnection] = liveness.WatchedClient
) -> AsyncIterator[Ends]:
    """Connect a device to a hub's door. An unwatched device sends no pings, like a browser."""
    hubs: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def hold(connection: ServerConnection) -> None:
        assert isinstance(connection, Connection)
        connection.admit()
        hubs.put_nowait(connection)
        await connection.wait_closed()

    options = serve_options(Door(Limits(), 100))
    async with (
        serve(
            hold,
            "127.0.0.1",
            0,
            subprotocols=[SUBPROTOCOL],
            compression=None,
            **options,  # type: ignore[list-item]
        ) as server,
        relay(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", up, down) as network,
        connect(
            network.url,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            max_size=None,
            ping_interval=None,
            close_timeout=0.1,
            create_connection=device_end,
        ) as device,
    ):
        yield Ends(device, await hubs.get(), network)


async def send(connection: ClientConnection, sizes: list[int]) -> None:
    for size in sizes:
        await connection.send(bytes(size))


@pytest.mark.parametrize("device_end", [liveness.WatchedClient, ClientConnection])
def test_one_frame_that_takes_longer_than_the_time_arrives(
    device_end: type[ClientConnection],
) -> None:
    """Old devices send a message as one frame; pings and pongs wait behind it."""

    async def test() -> None:
        async with ends(up=300_000, device_end=device_end) as both:
            frame = bytes(700_000)
            began = time.monotonic()
            await both.device.send(frame)
            assert await both.hub.recv() == frame
            assert time.monotonic() - began > 3 * DEAD_S

    run(test())


@pytest.mark.parametrize("device_end", [liveness.WatchedClient, ClientConnection])
def test_one_frame_of_the_hub_that_takes_longer_than_the_time_arrives(
    device_end: type[ClientConnection],
) -> None:
    async def test() -> None:
        async with ends(down=300_000, device_end=device_end) as both:
            frame = bytes(700_000)
            await both.hub.send(frame)
            assert await both.device.recv() == frame

    run(test())


def test_a_connection_on_which_nothing_happens_stays() -> None:
    async def test() -> None:
        async with ends() as both:
            await asyncio.sleep(3 * DEAD_S)
            await both.device.send(b"still here")
            assert await both.hub.recv() == b"still here"

    run(test())


def test_pings_are_as_far_apart_as_they_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they are a third of the time after which a connection is dead, as by default."""
    monkeypatch.setattr(liveness, "PING_S", 0.4)
    monkeypatch.setattr(liveness, "DEAD_S", 1.2)
    pings: list[float] = []

    class Noting(ClientConnection):
        def process_event(self, event: Any) -> None:
            if isinstance(event, Frame) and event.opcode is Opcode.PING:
                pings.append(time.monotonic())
            super().process_event(event)

    async def test() -> None:
        async with ends(device_end=Noting):
            while len(pings) < 4:
                await asyncio.sleep(0.05)

    run(test())
    assert pings[3] - pings[0] < 3 * 0.55


@pytest.mark.parametrize("sending", [False, True])
def test_both_ends_see_a_network_that_passes_nothing_on(sending: bool) -> None:
    async def test() -> None:
        async with ends(up=10e6) as both:
            sent = asyncio.create_task(both.device.send(bytes(8_000_000))) if sending else None
            await asyncio.sleep(0.1)
            both.network.blocked |= {"up", "down"}
            began = time.monotonic()
            for end in (both.device, both.hub):
                with pytest.raises(ConnectionClosed):
                    await end.recv()
            assert DEAD_S * 0.5 < time.monotonic() - began < 4 * DEAD_S
            if sent is not None:
                with contextlib.suppress(ConnectionClosed):
                    await sent

    run(test())


def test_a_peer_that_takes_nothing_is_dead_also_while_nothing_is_read_from_it() -> None:
    """The hub does not read on from a device while too much waits for the device."""

    async def test() -> None:
        async with ends() as both:
            for _ in range(10):  # more than the hub takes without being asked
                await both.device.send(bytes(100_000))
            both.network.blocked |= {"down"}
            async with asyncio.timeout(5 * DEAD_S):
                with contextlib.suppress(ConnectionClosed):
                    await both.hub.send(bytes(20_000_000))
                await both.hub.wait_closed()

    run(test())


def test_who_is_not_read_for_long_is_not_dead() -> None:
    """A slow trunk lets a device wait for as long as it takes."""

    async def test() -> None:
        async with ends() as both:
            sizes = [1000] * 10 + [3_000_000]
            sent = asyncio.create_task(send(both.device, sizes))
            await asyncio.sleep(4 * DEAD_S)
            assert [len(await both.hub.recv()) for _ in sizes] == sizes
            await sent

    run(test())


def test_the_error_says_that_nothing_moved() -> None:
    async def test() -> None:
        async with ends() as both:
            link = WebSocketLink(both.device)
            both.network.blocked |= {"up", "down"}
            with pytest.raises(LinkClosed, match="not a byte moved for"):
                await link.receive()

    run(test())


def test_a_device_opens_watched_connections() -> None:
    async def test() -> None:
        async with ends() as both:
            link = await open_websocket(both.network.url)
            both.network.blocked |= {"up", "down"}
            with pytest.raises(LinkClosed):
                await link.receive()

    run(test())
