"""The gateway: which devices it admits, and what it answers to others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.protocol.frames import decode, encode_message
from edge_sdk.protocol.message import PIECES
from edge_sdk.protocol.messages import Bye, Error, Piece, Ready, Round, Update, Welcome
from edge_sdk.protocol.pieces import PIECE
from edge_sdk.transport import flow
from server_hub.config import HubConfig
from server_hub.gateway.limits import Limits
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from tests.lib.harness import hub_config, running_hub
from tests.lib.raw_client import GOOD, RawClient, raw
from tests.lib.tasks import run

Scenario = Callable[[str, HubConfig], Awaitable[None]]


def with_hub(folder: Path, bundles: BundleIndex, scenario: Scenario, **changes: Any) -> None:
    """Run a scenario against a hub whose job waits for two devices."""
    config = hub_config(folder, bundles, rounds=RoundRules(count=1, min_devices=2), **changes)

    async def job() -> None:
        async with running_hub(config) as (_, url):
            await scenario(url, config)

    run(job(), 30)


async def refusal(client: RawClient, token: str) -> Error:
    """Return the error that a client gets instead of a welcome."""
    with suppress(ConnectionClosed):  # a full hub refuses before the hello
        await client.say(replace(GOOD, token=token))
    error: Error = await client.hear(Error)
    assert error.fatal
    assert await client.closed()
    return error


async def let_in(url: str, token: str) -> bool:
    """Return whether the hub welcomes a device."""
    async with raw(url) as connection:
        client = RawClient(connection)
        try:
            return (await client.greet(token)).device == "other"
        except (ConnectionClosed, AssertionError):  # the hub refused
            return False


def test_a_hub_without_connections_left_says_so(tmp_path: Path, bundles: BundleIndex) -> None:
    """The next device is admitted as soon as one has left."""

    async def scenario(url: str, config: HubConfig) -> None:
        tokens = TokenFile(config.tokens)
        one, other = tokens.issue("one"), tokens.issue("other")
        async with raw(url) as first:
            client = RawClient(first)
            await client.greet(one)
            async with raw(url) as second:
                error = await refusal(RawClient(second), other)
                assert (error.code, "no connections left" in error.message) == ("busy", True)
        async with asyncio.timeout(10):
            while not await let_in(url, other):  # until the hub notices that the first has left
                await asyncio.sleep(0.05)

    with_hub(tmp_path, bundles, scenario, limits=Limits(connections=1, session_s=5, hello_s=2))


def test_a_token_file_that_breaks_keeps_devices_out_and_the_hub_up(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is told that the hub is at fault; the operator is told the fault in the file."""

    async def scenario(url: str, config: HubConfig) -> None:
        token = TokenFile(config.tokens).issue("phone")
        good = config.tokens.read_text()
        config.tokens.write_text("[devices")
        async with raw(url) as connection:
            error = await refusal(RawClient(connection), token)
            assert (error.code, error.field) == ("internal", None)
            assert str(config.tokens) not in error.message
        config.tokens.write_text(good)
        async with raw(url) as connection:
            assert (await RawClient(connection).greet(token)).device == "phone"

    with_hub(tmp_path, bundles, scenario)
    (logged,) = (r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage())
    assert str(tmp_path / "tokens.toml") in logged


def test_a_second_connection_with_a_token_takes_the_place_of_the_first(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """The first connection gets an error, and the second takes part in the round."""

    async def scenario(url: str, config: HubConfig) -> None:
        tokens = TokenFile(config.tokens)
        token, other = tokens.issue("phone"), tokens.issue("other")
        async with raw(url) as old, raw(url) as new, raw(url) as third:
            first, second = RawClient(old), RawClient(new)
            await first.greet(token)
            welcome = await second.greet(token)
            assert (welcome.device, welcome.resumed) == ("phone", False)
            error = await first.hear(Error)
            assert (error.code, error.fatal) == ("replaced", True)
            assert await first.closed()
            await second.say(Ready(samples=8))
            await RawClient(third).join(other)
            await second.hear(Round)

    with_hub(tmp_path, bundles, scenario)


def test_an_error_that_a_device_reports_is_logged(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """The device's session continues."""
    caplog.set_level(logging.WARNING, "cutlayer.hub")

    async def scenario(url: str, config: HubConfig) -> None:
        tokens = TokenFile(config.tokens)
        async with raw(url) as one, raw(url) as other:
            client = RawClient(one)
            await client.greet(tokens.issue("phone"))
            await client.say(Error(code="internal", message="the disk is full", fatal=False))
            await client.say(Ready(samples=8))
            await RawClient(other).join(tokens.issue("other"))
            await client.hear(Round)

    with_hub(tmp_path, bundles, scenario)
    assert "phone reports: the disk is full" in [r.getMessage() for r in caplog.records]


def test_what_a_device_says_after_bye_has_no_effect(tmp_path: Path, bundles: BundleIndex) -> None:
    """Its session has ended, but its link has not; the hub continues and ignores the message."""

    async def scenario(url: str, config: HubConfig) -> None:
        tokens = TokenFile(config.tokens)
        secrets = [tokens.issue(name) for name in ("gone", "one", "two")]
        async with raw(url) as first, raw(url) as second, raw(url) as third:
            left = RawClient(first)
            await left.greet(secrets[0])
            await left.say(Bye(reason="done"))
            await left.say(Ready(samples=8))
            clients = [RawClient(second), RawClient(third)]
            rounds = await asyncio.gather(
                *(c.join(token) for c, token in zip(clients, secrets[1:], strict=True))
            )
            assert [task.round for task in rounds] == [1, 1]

    with_hub(tmp_path, bundles, scenario)


class PieceClient(RawClient):
    """A client that sends messages in pieces."""

    def __init__(self, connection: ClientConnection) -> None:
        super().__init__(connection, [PIECES])

    async def acknowledged(self) -> int:
        """The acknowledgement of the next frame."""
        return decode(await self.connection.recv(), agreed=self.extensions).ack

    async def send_pieces(self, data: bytes, until: int | None = None) -> None:
        """Send the bytes of a message, without the end if ``until`` says where to stop."""
        for start in range(0, until or len(data), PIECE):
            part = data[start : start + PIECE]
            await self.say(Piece(data=part, last=start + PIECE >= len(data)))


@asynccontextmanager
async def in_pieces(
    url: str, config: HubConfig, name: str = "phone"
) -> AsyncIterator[tuple[PieceClient, Welcome]]:
    """Connect a device that offers to send messages in pieces; yields it with its welcome."""
    token = TokenFile(config.tokens).issue(name)
    async with raw(url) as connection:
        client = PieceClient(connection)
        yield client, await client.greet(token)


def long_update(size: int) -> bytes:
    tensors = {"w": np.zeros(size, np.uint8)}
    return encode_message(Update(round=1, tensors=tensors, done=True, samples=1, metrics={}))


def test_messages_that_never_end_take_bounded_memory_and_stop_nobody(
    tmp_path: Path, bundles: BundleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices fill the memory of all with unfinished messages; a third gets its one through."""
    monkeypatch.setattr(flow, "STALLED_S", 0.3)
    limits = Limits(waiting_mb=1, total_waiting_mb=1, max_message=2**20, session_s=5.0, hello_s=2.0)

    async def scenario(url: str, config: HubConfig) -> None:
        message = long_update(1_000_000)
        async with (
            in_pieces(url, config, "lazy") as (lazy, first),
            in_pieces(url, config, "lazier") as (lazier, second),
            in_pieces(url, config, "honest") as (honest, third),
        ):
            for welcome in (first, second, third):
                assert (welcome.extensions, welcome.max_message) == ([PIECES], 2**20)
            await lazy.send_pieces(message, 900_000)
            await lazier.send_pieces(message, 500_000)
            sending = asyncio.create_task(honest.send_pieces(message))
            assert (await lazy.hear(Error)).code == "busy"
            await sending
            async with asyncio.timeout(5):
                while (await honest.acknowledged()) < honest.seq:
                    pass

    with_hub(tmp_path, bundles, scenario, limits=limits)


def test_a_message_in_pieces_over_the_limit_ends_the_session(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    async def scenario(url: str, config: HubConfig) -> None:
        async with in_pieces(url, config) as (client, _):
            await client.send_pieces(long_update(300_000))
            assert (await client.hear(Error)).code == "frame_too_big"
            assert await client.closed()

    with_hub(tmp_path, bundles, scenario, limits=Limits(max_message=200_000, hello_s=2.0))


def test_a_hub_whose_frames_are_too_small_for_pieces_does_not_offer_them(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    async def scenario(url: str, config: HubConfig) -> None:
        async with in_pieces(url, config) as (_, welcome):
            assert (welcome.extensions, welcome.max_message) == (None, None)

    with_hub(tmp_path, bundles, scenario, limits=Limits(max_frame=100_000, blob_piece=50_000))
