"""The door: what strangers cost, and that they keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from server_hub.gateway.door import (
    MAX_FRAGMENTS,
    PING_BURST,
    Connection,
    Door,
    network_of,
    serve_options,
)
from server_hub.gateway.limits import HELLO_BYTES, Limits
from tests.lib.tasks import run

LIMITS = Limits(strangers=4, strangers_per_address=2, hello_s=0.5)


class Doorway:
    """An echo server behind a door.

    The message ``hello`` admits a connection, ``address`` asks for the address it counts for.
    """

    def __init__(self, door: Door, url: str) -> None:
        self.door, self.url = door, url

    async def open(self, address: str = "10.0.0.1") -> ClientConnection:
        """Connect as from an address, by way of a trusted proxy."""
        return await connect(
            self.url,
            additional_headers={"X-Forwarded-For": address},
            compression=None,
            open_timeout=5,
        )

    async def admitted(self, address: str = "10.0.0.1") -> ClientConnection:
        """Connect, and be admitted."""
        connection = await self.open(address)
        await connection.send("hello")
        assert await connection.recv() == "hello"
        return connection


@asynccontextmanager
async def doorway(
    limits: Limits = LIMITS, room: int = 100, trusted: tuple[str, ...] = ("127.0.0.0/8",)
) -> AsyncIterator[Doorway]:
    door = Door(limits, room, trusted)

    async def echo(connection: ServerConnection) -> None:
        assert isinstance(connection, Connection)
        async for message in connection:
            if message == "hello":
                connection.admit()
            await connection.send(connection.address if message == "address" else message)

    async with serve(echo, "127.0.0.1", 0, **serve_options(door)) as server:
        port = server.sockets[0].getsockname()[1]
        yield Doorway(door, f"ws://127.0.0.1:{port}")


async def closes(connection: ClientConnection) -> bool:
    try:
        async with asyncio.timeout(3):
            while True:
                await connection.recv()
    except ConnectionClosed:
        return True
    except TimeoutError:
        return False


def test_strangers_above_the_bound_of_an_address_wait_and_others_do_not() -> None:
    async def test() -> None:
        async with doorway(replace(LIMITS, hello_s=3.0)) as way, AsyncExitStack() as stack:
            first = [await way.open("10.0.0.1") for _ in range(2)]
            third = asyncio.create_task(way.open("10.0.0.1"))
            await asyncio.sleep(0.2)
            assert not third.done()
            other = await asyncio.wait_for(way.open("10.0.0.2"), 1)
            await first[0].send("hello")  # a device is no stranger any more
            last = await asyncio.wait_for(third, 1)
            for connection in (*first, other, last):
                stack.push_async_callback(connection.close)

    run(test())


def test_strangers_above_the_bound_of_all_wait_in_order() -> None:
    async def test() -> None:
        async with doorway(replace(LIMITS, hello_s=3.0)) as way, AsyncExitStack() as stack:
            inside = [await way.open(f"10.0.0.{i}") for i in range(4)]
            waiting = []
            for i in range(4, 7):
                waiting.append(asyncio.create_task(way.open(f"10.0.0.{i}")))
                await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting)
            for i in range(3):
                await inside[i].close()
                await asyncio.wait_for(asyncio.shield(waiting[i]), 1)
                assert not any(task.done() for task in waiting[i + 1 :])
            for connection in (inside[3], *[await task for task in waiting]):
                stack.push_async_callback(connection.close)

    run(test())


def test_who_waits_too_long_is_asked_to_come_later() -> None:
    async def test() -> None:
        async with doorway() as way:
            inside = [await way.open() for _ in range(2)]
            with pytest.raises(InvalidStatus, match="503"):
                await way.open()
            for connection in inside:
                await connection.close()
            await (await way.open()).close()

    run(test())


def test_a_connection_without_a_request_is_closed_in_time() -> None:
    async def test() -> None:
        async with doorway() as way:
            host, port = way.url.removeprefix("ws://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            began = asyncio.get_running_loop().time()
            assert await reader.read() == b""
            assert asyncio.get_running_loop().time() - began < 2.0
            assert way.door.strangers == 0
            writer.close()

    run(test())


def test_without_room_the_address_with_most_strangers_loses_its_oldest() -> None:
    """However many connections a stranger holds, devices stay and others come in."""

    async def test() -> None:
        limits = Limits(strangers=50, strangers_per_address=50, hello_s=5.0)
        async with doorway(limits, room=6) as way:
            device = await way.admitted("10.0.0.9")
            flood = [await way.open("10.0.0.1") for _ in range(5)]
            honest = await way.admitted("10.0.0.2")
            assert await closes(flood[0])
            flood += [await way.open("10.0.0.1") for _ in range(3)]
            assert [await closes(c) for c in flood[1:4]] == [True] * 3
            for connection in (device, honest):
                await connection.send("still here")
                assert await connection.recv() == "still here"
            for connection in (device, honest, *flood):
                await connection.close()

    run(test())


def test_only_an_admitted_connection_may_send_large_messages() -> None:
    async def test() -> None:
        async with doorway() as way:
            stranger = await way.open()
            await stranger.send(b"x" * (HELLO_BYTES + 1))
            assert await closes(stranger)
            device = await way.admitted()
            await device.send(b"x" * (4 * HELLO_BYTES))
            assert len(await device.recv()) == 4 * HELLO_BYTES
            await device.close()

    run(test())


def test_a_flood_of_pings_and_a_message_in_crumbs_end_the_connection() -> None:
    async def test() -> None:
        async with doorway() as way:
            calm, pinging, crumbs = [await way.admitted(f"10.0.0.{i}") for i in range(3)]
            for _ in range(10):
                await (await calm.ping())
            for _ in range(int(PING_BURST) + 5):
                try:
                    await pinging.ping()
                except ConnectionClosed:
                    break
            assert await closes(pinging)
            await crumbs.send([b"x"] * 100)
            assert await crumbs.recv() == b"x" * 100
            with contextlib.suppress(ConnectionClosed):
                await crumbs.send([b"x"] * (MAX_FRAGMENTS + 5))
            assert await closes(crumbs)
            await calm.send("still here")
            assert await calm.recv() == "still here"
            await calm.close()

    run(test())


@pytest.mark.parametrize(
    ("trusted", "forwarded", "counted"),
    [
        ((), "1.2.3.4", "127.0.0.1"),
        (("127.0.0.1",), "1.2.3.4", "1.2.3.4"),
        (("127.0.0.1",), "9.9.9.9, 1.2.3.4", "1.2.3.4"),
        (("127.0.0.1", "1.2.0.0/16"), "9.9.9.9, 1.2.3.4", "9.9.9.9"),
        (("127.0.0.1",), "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        (("10.0.0.0/8",), "1.2.3.4", "127.0.0.1"),
        (("127.0.0.1",), "nonsense", "nonsense"),
    ],
)
def test_a_trusted_proxy_passes_the_address_on(
    trusted: tuple[str, ...], forwarded: str, counted: str
) -> None:
    """What a peer says itself stands before what the proxy adds, and is not believed."""

    async def test() -> None:
        async with doorway(trusted=trusted) as way:
            connection = await way.open(forwarded)
            await connection.send("address")
            assert await connection.recv() == counted
            await connection.close()

    run(test())


def test_an_ipv6_address_counts_for_its_network() -> None:
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2:ffff::1")
    assert network_of("2001:db8:1:2::1") != network_of("2001:db8:1:3::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") == "10.0.0.1"
    assert network_of("fe80::1%eth0") == "fe80::/64"
