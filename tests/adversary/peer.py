"""A scripted hostile peer: what it may know, and how it talks to a hub."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import msgpack
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import (
    SUBPROTOCOL,
    VERSION,
    BlobGet,
    Error,
    Hello,
    Message,
    Ready,
    Round,
    Welcome,
)

PATIENCE_S = 10.0
"""Seconds that a scenario waits for what must come."""


class Hostile:
    """One connection of a hostile peer that says whatever it is told to."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.seq = 0

    async def say(self, message: Message, seq: int | None = None, ack: int = 0) -> None:
        """Send a message, numbered as it should be unless ``seq`` is given."""
        self.seq += message.RELIABLE
        number = (self.seq if message.RELIABLE else 0) if seq is None else seq
        await self.raw(encode(message, number, ack))

    async def raw(self, frame: bytes | str) -> None:
        """Send a frame as it is; a connection that is closed already is as good."""
        with contextlib.suppress(ConnectionClosed):
            await self.connection.send(frame)

    async def body(self, kind: str, body: Any, seq: int = 1, ack: int = 0) -> None:
        """Send a frame whose fields no message class allows."""
        await self.raw(msgpack.packb([kind, seq, ack, body]))

    async def hear(self, kind: type[Message]) -> Any:
        """The next message of a kind; others are skipped."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = decode(await self.connection.recv()).message
                if isinstance(message, kind):
                    return message

    async def is_refused(self, *codes: str) -> None:
        """The hub sends a fatal error with one of the codes, and closes the connection."""
        error: Error = await self.hear(Error)
        assert error.fatal, error
        assert error.code in codes, error
        await self.is_closed()

    async def is_closed(self) -> None:
        """The hub closes the connection."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.connection.recv()

    async def is_served(self) -> None:
        """The hub still answers this connection: a blob that is not there is reported."""
        await self.say(BlobGet(hash="0" * 64, offset=0))
        while True:
            error = await self.hear(Error)
            if error.code == "unknown_blob":
                return


@dataclass
class Attacker:
    """What a scenario works with.

    Attributes:
        url: address of the hub.
        tokens: tokens of devices that are the attacker's; a scenario takes what it needs.
        manifest: manifest of its tier.
    """

    url: str
    tokens: list[str]
    manifest: Manifest

    def token(self) -> str:
        """A token that no scenario uses at this moment."""
        return self.tokens.pop()

    def give_back(self, token: str) -> None:
        """Let other scenarios use a token again."""
        self.tokens.insert(0, token)

    @asynccontextmanager
    async def stranger(self) -> AsyncIterator[Hostile]:
        """A connection without a hello."""
        connection = await connect(
            self.url,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            open_timeout=PATIENCE_S,
            close_timeout=1,
        )
        try:
            yield Hostile(connection)
        finally:
            await connection.close()

    async def is_refused_with(self, frame: bytes | str, *codes: str) -> None:
        """A stranger's first frame is refused with one of the codes."""
        async with self.stranger() as peer:
            await peer.raw(frame)
            await peer.is_refused(*codes)

    @asynccontextmanager
    async def device(self, **hello: Any) -> AsyncIterator[Hostile]:
        """A connection that has been welcomed."""
        token = self.token()
        try:
            async with self.stranger() as peer:
                await peer.say(replace(Hello(VERSION, token, "small"), **hello))
                await peer.hear(Welcome)
                yield peer
        finally:
            self.give_back(token)

    @asynccontextmanager
    async def member(self, samples: int = 32) -> AsyncIterator[tuple[Hostile, Round]]:
        """A device that takes part in a round."""
        async with self.device() as peer:
            await peer.say(Ready(samples=samples))
            async with asyncio.timeout(60):
                task: Round = await _round(peer)
            yield peer, task

    @asynccontextmanager
    async def tcp(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A TCP connection, below the protocol."""
        where = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _round(peer: Hostile) -> Round:
    while True:
        message = decode(await peer.connection.recv()).message
        if isinstance(message, Round):
            return message
