"""A client that sends single frames, and messages that a hub accepts."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import (
    SUBPROTOCOL,
    Activations,
    Error,
    Hello,
    Message,
    Ready,
    Round,
    Update,
    Welcome,
)

GOOD = Hello(version=1, token="", tier="small")


class RawClient:
    """A client that sends single frames, also those that a Device never sends."""

    def __init__(self, connection: ClientConnection, extensions: Collection[str] = ()) -> None:
        self.connection, self.extensions = connection, extensions
        self.seq = 0

    async def say(self, message: Message) -> None:
        """Send a message, numbered if it is reliable."""
        self.seq += message.RELIABLE
        seq = self.seq if message.RELIABLE else 0
        await self.connection.send(encode(message, seq, 0, self.extensions))

    async def hear(self, kind: type[Message]) -> Any:
        """The next message of a kind; others are skipped, unless they are errors."""
        async with asyncio.timeout(20):
            while True:
                message = decode(await self.connection.recv(), agreed=self.extensions).message
                if isinstance(message, kind):
                    return message
                assert not isinstance(message, Error), message

    async def greet(self, token: str, hello: Hello = GOOD) -> Welcome:
        """Say hello, and wait for the welcome."""
        extensions = list(self.extensions) or hello.extensions
        await self.say(replace(hello, token=token, extensions=extensions))
        welcome: Welcome = await self.hear(Welcome)
        return welcome

    async def join(self, token: str, samples: int = 32, hello: Hello = GOOD) -> Round:
        """Say hello and ready, and wait for a round."""
        await self.greet(token, hello)
        await self.say(Ready(samples=samples))
        task: Round = await self.hear(Round)
        return task

    async def closed(self) -> bool:
        """Whether the hub closes the connection soon."""
        try:
            async with asyncio.timeout(5):
                while True:
                    await self.connection.recv()
        except ConnectionClosed:
            return True
        except TimeoutError:
            return False


def raw(url: str) -> Any:
    """Connect to a hub; use as an asynchronous context manager."""
    return connect(url, subprotocols=[SUBPROTOCOL], compression=None)  # type: ignore[list-item]


def good_activations(manifest: Manifest, number: int, rows: int = 8) -> Activations:
    """Random activations that fit a manifest, as the first batch of a round."""
    rng = np.random.default_rng(0)
    parts = {}
    for spec in manifest.packed:
        shape = [rows if n == "batch" else int(n) for n in spec.shape]
        values = rng.random(shape) if "float" in spec.dtype else rng.integers(0, 9, shape)
        parts[spec.name] = values.astype(spec.dtype)
    return Activations(round=number, batch=0, parts=parts, labels=np.zeros(rows, np.int64))


def good_update(manifest: Manifest, number: int, samples: int = 32) -> Update:
    """An update of zeros that fits a manifest."""
    tensors = {s.name: np.zeros(s.shape, s.dtype) for s in manifest.exchanged()}  # type: ignore[arg-type]
    return Update(
        round=number,
        tensors=tensors,
        done=True,
        samples=samples,
        metrics={"loss": 1.0, "accuracy": 0.5},
    )
