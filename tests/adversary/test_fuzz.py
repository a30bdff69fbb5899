"""Frames that are nearly right get documented errors, at a bounded cost."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.channel import Channel
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode
from edge_sdk.protocol.messages import Error
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from tests.adversary.fuzzer import Fuzzer
from tests.adversary.peer import Attacker, Hostile
from tests.lib.harness import hub_config, running_hub
from tests.lib.tasks import run


@pytest.mark.parametrize("frames", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_mutated_frame_is_decoded_or_refused(frames: int) -> None:
    """Nothing but a :class:`ProtocolError` with a documented code comes out, in a bounded time."""
    fuzzer, channel = Fuzzer(seed=frames), Channel()
    codes: dict[str, int] = {}
    taken, slowest, longest = 0, 0.0, 0
    tracemalloc.start()
    for number in range(frames):
        if number == frames // 10:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
        data = fuzzer.frame()
        began = time.process_time()
        try:
            frame = decode(data)
            taken += 1
            channel.accept(frame)
        except ProtocolError as error:
            codes[error.code] = codes.get(error.code, 0) + 1
            longest = max(longest, len(str(error)))
        slowest = max(slowest, time.process_time() - began)
        channel = Channel()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken > frames // 100, "some mutations leave a frame that is right"
    assert {"bad_frame", "bad_message", "bad_tensor", "unknown_type"} <= codes.keys()
    assert codes.keys() <= set(ErrorCode)
    assert longest < 5_000
    assert slowest < 0.25
    # Python keeps one table of the keys of maps, which doubles at times; it is 8 MB by then
    assert after - before < 10_000_000
    assert peak - before < 20_000_000


@pytest.mark.slow
def test_mutated_frames_over_sockets_end_their_connections_and_nothing_else(
    bundles: BundleIndex, tmp_path: Path
) -> None:
    """5,000 frames: the hub answers with documented errors, and serves on."""
    fuzzer = Fuzzer(seed=5_000)

    async def test() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1, min_devices=2))
        token = TokenFile(config.tokens).issue("mallory")
        attacker = Attacker("", [token], bundles.manifest("small"))
        codes: set[str] = set()
        sent = 0
        async with running_hub(config) as (hub, attacker.url):
            while sent < 5_000:
                async with attacker.device() as peer:
                    sent += await _send_until_closed(peer, fuzzer, codes)
            async with attacker.device() as peer:
                await peer.is_served()
            assert len(hub.gateway.peers) <= 1
        assert codes <= set(ErrorCode)
        assert {"bad_frame", "bad_message", "bad_tensor", "unknown_type"} <= codes

    run(test(), 400)


async def _send_until_closed(peer: Hostile, fuzzer: Fuzzer, codes: set[str]) -> int:
    """Send frames until the hub closes the connection; returns their number."""
    for number in range(1, 50):
        await peer.raw(fuzzer.frame())
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(0.02):
                while True:
                    message = decode(await peer.connection.recv()).message
                    if isinstance(message, Error):
                        codes.add(message.code)
        if peer.connection.close_code is not None:
            return number
    return number
