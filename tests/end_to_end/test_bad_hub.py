"""Errors of a device when a hub breaks the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve

from edge_sdk import BundleError, Device, HubError
from edge_sdk.protocol.channel import Channel
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import (
    SUBPROTOCOL,
    VERSION,
    Ack,
    Blob,
    BlobGet,
    Error,
    Message,
    Welcome,
)

HASH = "0" * 64
WELCOME = Welcome(VERSION, "phone", "small", "s", False, 0, HASH, 16, 2**20)


@asynccontextmanager
async def bad_hub(
    first: Message, answer: Callable[[BlobGet], Message] | None = None
) -> AsyncIterator[str]:
    """Serve the answer to a hello, and an answer to each request for a blob; yield the address."""

    async def talk(connection: ServerConnection) -> None:
        channel = Channel(16)
        decode(await connection.recv())  # type: ignore[arg-type]
        await connection.send(encode(first, 0, 0))
        async for data in connection:
            delivery = channel.receive(data)  # type: ignore[arg-type]
            if delivery is not None and isinstance(delivery.message, BlobGet) and answer:
                await connection.send(channel.send(answer(delivery.message)))

    server = await serve(
        talk,
        "127.0.0.1",
        0,
        subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        compression=None,
    )
    try:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def connect(
    folder: Path, first: Message, answer: Callable[[BlobGet], Message] | None = None
) -> None:
    """Connect a device to a bad hub; raise the error of :meth:`Device.connect`."""

    async def job() -> None:
        async with bad_hub(first, answer) as url:
            await Device.connect(url, token="t", tier="small", cache=folder, patience_s=0.5)

    asyncio.run(asyncio.wait_for(job(), 20))


def test_a_hub_that_does_not_answer_the_hello_with_a_welcome(tmp_path: Path) -> None:
    """The device gives up at once, because a new attempt would not help."""
    with pytest.raises(HubError, match="the hub answered hello with ack") as caught:
        connect(tmp_path, Ack())
    assert caught.value.code == "bad_message"


def test_a_refusal_is_raised_as_the_hub_has_said_it(tmp_path: Path) -> None:
    """The error has the hub's code, text and field."""
    refusal = Error(code="bad_token", message="the token is no device's", fatal=True, field="token")
    with pytest.raises(HubError, match="the token is no device's") as caught:
        connect(tmp_path, refusal)
    assert (caught.value.code, caught.value.field) == ("bad_token", "token")


def test_a_piece_without_bytes_does_not_go_on_for_ever(tmp_path: Path) -> None:
    """The hub announces a longer blob and sends no bytes; the device gives up."""

    def nothing(wanted: BlobGet) -> Message:
        return Blob(hash=wanted.hash, offset=wanted.offset, size=100, data=b"")

    with pytest.raises(BundleError, match="an empty piece of blob 000000000000"):
        connect(tmp_path, WELCOME, nothing)


def test_bytes_that_are_not_those_of_the_hash_are_refused(tmp_path: Path) -> None:
    """The cache keeps none of these bytes."""

    def other(wanted: BlobGet) -> Message:
        return Blob(hash=wanted.hash, offset=wanted.offset, size=5, data=b"other")

    with pytest.raises(BundleError, match="changed or damaged"):
        connect(tmp_path, WELCOME, other)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
