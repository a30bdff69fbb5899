"""Frames that are nearly right get documented errors, at a bounded cost."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.channel import Channel
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode
from tests.adversary.fuzzer import Fuzzer


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
    # Python keeps a table of the keys of maps, which grows by doubling: 10 bytes for a frame
    assert after - before < max(10 * frames, 2_000_000)
    assert peak - before < 20_000_000
