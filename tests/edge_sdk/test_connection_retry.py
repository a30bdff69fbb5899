"""A device goes on trying what is temporary, with growing pauses, until its patience ends."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edge_sdk.errors import CutlayerError, HubError, LinkClosed
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import (
    VERSION,
    Blob,
    BlobGet,
    Error,
    Hello,
    Infer,
    Message,
    Ready,
    Welcome,
)
from edge_sdk.protocol.states import ConnectionState
from edge_sdk.transport.connection import Connection, Question
from edge_sdk.transport.link import Link, MemoryLink
from server_hub.simulation import clock
from server_hub.simulation.clock import VirtualLoop
from tests.lib.specification import rows, section

HASH = "0" * 64
WELCOME = Welcome(VERSION, "phone", "small", "s", False, 0, HASH, 8, 2**20)
DATA = bytes(range(100))


def refusal(code: str) -> Error:
    """Return the fatal error with a code."""
    return Error(code=code, message="try later", fatal=True)


class ScriptedHub:
    """A hub that answers one ``hello`` after the other as its script says.

    Args:
        answers: what each ``hello`` is answered with: an error, a welcome, or None if nobody
            listens. After the last one the hub welcomes.
        then: error that the first request of a device that it welcomed gets, for as many welcomes.
    """

    def __init__(self, answers: list[Message | None], then: list[Error]) -> None:
        self._answers, self._then = answers, then
        self.listening = True
        self.later = WELCOME
        """What a hello is answered with after those of the script."""
        self.heard: list[Message] = []
        """What devices have sent after their hello."""
        self.tries: list[float] = []
        """Times at which the device tried to connect."""
        self._serving: list[asyncio.Task[None]] = []

    async def open(self) -> Link:
        self.tries.append(asyncio.get_running_loop().time())
        answer = self._answers.pop(0) if self._answers else self.later
        if answer is None or not self.listening:
            raise LinkClosed("nobody listens")
        mine, theirs = MemoryLink.pair()
        self._serving.append(asyncio.create_task(self._serve(theirs, answer)))
        return mine

    async def _serve(self, link: Link, answer: Message) -> None:
        assert isinstance(decode(await link.receive()).message, Hello)
        await link.send(encode(answer, 0, 0))
        while isinstance(answer, Welcome):
            try:
                request = decode(await link.receive()).message
                self.heard.append(request)
            except LinkClosed:
                return
            if self._then:
                await link.send(encode(self._then.pop(0), 0, 0))
                break
            if isinstance(request, BlobGet):
                await link.send(encode(Blob(request.hash, 0, len(DATA), DATA), 0, 0))
        await link.close()

    @property
    def pauses(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.tries)]


def connected(
    test: Callable[[Connection, ScriptedHub], Any],
    answers: list[Message | None],
    then: list[Error] | None = None,
    patience_s: float = 60.0,
) -> None:
    """Run a test with a connection to a scripted hub, on the virtual clock."""

    async def main(loop: VirtualLoop) -> None:
        hub = ScriptedHub(answers, then or [])
        connection = Connection(hub.open, token="t", tier=None, patience_s=patience_s)
        try:
            await test(connection, hub)
        finally:
            await connection.close("done")

    clock.run(main)


def assert_growing(pauses: list[float]) -> None:
    """Each pause is random, between half of its longest value and this value, which doubles."""
    for number, pause in enumerate(pauses):
        longest = min(0.1 * 2**number, 10.0)
        assert longest / 2 <= pause <= longest
    assert len({pause / 0.1 / 2**number for number, pause in enumerate(pauses)}) == len(pauses)


def test_the_temporary_codes() -> None:
    temporary = {code.value for code in ErrorCode if code.is_temporary}
    assert temporary == {"busy", "internal"}
    table = rows(section("Errors"))
    assert {row[0].strip("`") for row in table if row[3].startswith("temporary")} == temporary
    assert HubError("busy", "m").is_temporary
    assert not HubError("bad_token", "m").is_temporary
    assert not HubError("of a newer hub", "m").is_temporary


@pytest.mark.parametrize("code", ["busy", "internal", None])
def test_a_device_tries_again_until_the_hub_has_time(code: str | None) -> None:
    async def test(connection: Connection, hub: ScriptedHub) -> None:
        welcome = await connection.open()
        assert welcome.device == "phone"
        assert len(hub.tries) == 9
        assert_growing(hub.pauses)
        assert connection.linked

    connected(test, [None if code is None else refusal(code)] * 8)


@pytest.mark.parametrize(
    ("answer", "error"), [(refusal("busy"), HubError), (None, LinkClosed)]
)  # fmt: skip
def test_a_device_gives_up_when_its_patience_ends(
    answer: Message | None, error: type[CutlayerError]
) -> None:
    async def test(connection: Connection, hub: ScriptedHub) -> None:
        with pytest.raises(error):
            await connection.open()
        assert 40 < asyncio.get_running_loop().time() <= 60
        assert len(hub.tries) < 20
        assert connection.state is ConnectionState.ENDED

    connected(test, [answer] * 100)


@pytest.mark.parametrize("code", ["bad_token", "unknown_tier", "replaced", "of a newer hub"])
def test_what_would_be_refused_again_is_not_tried_again(code: str) -> None:
    async def test(connection: Connection, hub: ScriptedHub) -> None:
        with pytest.raises(HubError) as caught:
            await connection.open()
        assert caught.value.code == code
        assert hub.tries == [0.0]

    connected(test, [refusal(code)], patience_s=math.inf)


def test_a_download_goes_on_after_a_failure_of_the_hub() -> None:
    async def test(connection: Connection, hub: ScriptedHub) -> None:
        await connection.open()
        data = bytearray()
        await connection.download(HASH, 0, data.extend, 1000)
        assert data == DATA
        assert len(hub.tries) == 4

    connected(test, [WELCOME], [refusal("internal")] * 3)


def test_a_hub_that_welcomes_and_fails_at_once_ends_the_patience() -> None:
    async def test(connection: Connection, hub: ScriptedHub) -> None:
        await connection.open()
        with pytest.raises(HubError, match="try later"):
            await connection.download(HASH, 0, bytearray().extend, 1000)
        assert 40 < asyncio.get_running_loop().time() <= 60
        assert len(hub.tries) < 20

    connected(test, [WELCOME], [refusal("internal")] * 1000)


def test_questions_without_a_link_leave_the_window_free() -> None:
    """They wait outside it; a device that is offline for an hour asks as often as it likes."""

    async def test(connection: Connection, hub: ScriptedHub) -> None:
        await connection.open()
        hub.listening = False
        await connection.send(BlobGet(HASH, 0))  # the hub answers with an error and hangs up
        await asyncio.sleep(1)
        assert not connection.linked
        for _ in range(3 * WELCOME.window):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await connection.ask(Question({}, "small"))
        async with asyncio.timeout(0):
            await connection.send(Ready(samples=1))
        hub.listening, hub.later = True, replace(WELCOME, resumed=True)
        waiting = asyncio.create_task(connection.ask(Question({}, "small")))
        await asyncio.sleep(20)
        assert [type(m) for m in hub.heard if m.RELIABLE] == [Ready, Infer]
        waiting.cancel()

    connected(test, [WELCOME], [refusal("busy")], patience_s=math.inf)


def test_a_failure_after_a_long_time_is_met_with_the_whole_patience() -> None:
    async def test(connection: Connection, hub: ScriptedHub) -> None:
        await connection.open()
        await asyncio.sleep(1000)
        await connection.download(HASH, 0, bytearray().extend, 1000)
        assert len(hub.tries) == 6
        assert_growing([hub.pauses[0] - 1000, *hub.pauses[1:]])

    connected(test, [WELCOME, *[refusal("busy")] * 4], [refusal("internal")])
