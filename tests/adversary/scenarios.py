"""What a hostile peer does, and what must come of it.

The name of a scenario says what the peer does. Scenarios of rounds need somebody else who takes
part in them, so that rounds begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from edge_sdk.protocol.frames import encode
from edge_sdk.protocol.messages import (
    VERSION,
    Activations,
    BlobGet,
    Bye,
    Decline,
    Error,
    FeatureGradient,
    Hello,
    Infer,
    Ready,
    Update,
    Welcome,
)
from tests.adversary.peer import Attacker, Hostile
from tests.lib.raw_client import good_activations, good_update

Scenario = Callable[[Attacker], Awaitable[None]]

SCENARIOS: dict[str, Scenario] = {}
"""Every scenario by its name."""

OF_ROUNDS: set[str] = set()
"""Names of the scenarios of rounds."""

GUESS = "0" * 64


def scenario(run: Scenario) -> Scenario:
    """Add a scenario."""
    SCENARIOS[run.__name__] = run
    return run


def of_a_round(run: Scenario) -> Scenario:
    """Add a scenario of a round."""
    OF_ROUNDS.add(run.__name__)
    return scenario(run)


async def attempt(run: Scenario, attacker: Attacker) -> None:
    """Run a scenario; that the hub refuses or closes a connection early is no failure of it."""
    with contextlib.suppress(ConnectionClosed, InvalidHandshake, ConnectionError):
        await run(attacker)


def hello(**changes: Any) -> bytes:
    """A hello with fields that no message class allows."""
    return msgpack.packb(["hello", 0, 0, {"version": VERSION, "token": GUESS, **changes}])


def infer(attacker: Attacker, request: int, rows: int = 2, **changes: Any) -> Infer:
    """A question that fits the tier."""
    parts = good_activations(attacker.manifest, 1, rows).parts
    return replace(Infer(request=request, parts=parts), **changes)


# --- below the protocol ---------------------------------------------------------------------------


@scenario
async def says_nothing_on_a_tcp_connection(attacker: Attacker) -> None:
    async with attacker.tcp():
        await asyncio.sleep(0.2)


@scenario
async def sends_half_a_request(attacker: Attacker) -> None:
    async with attacker.tcp() as (_, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nUpg")
        await writer.drain()
        await asyncio.sleep(0.2)


@scenario
async def sends_a_request_with_endless_headers(attacker: Attacker) -> None:
    async with attacker.tcp() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for i in range(2000):
                writer.write(b"X-%d: %s\r\n" % (i, b"y" * 100))
            await writer.drain()
            await asyncio.wait_for(reader.read(), 5)


@scenario
async def asks_for_a_web_page(attacker: Attacker) -> None:
    async with attacker.tcp() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 4"), answer[:80]


@scenario
async def sends_random_bytes(attacker: Attacker) -> None:
    async with attacker.tcp() as (reader, writer):
        writer.write(secrets.token_bytes(4096))
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 10)


@scenario
async def opens_and_closes_connections(attacker: Attacker) -> None:
    for _ in range(20):
        async with attacker.tcp():
            pass


@scenario
async def says_nothing_after_the_handshake(attacker: Attacker) -> None:
    async with attacker.stranger():
        await asyncio.sleep(0.2)


@scenario
async def holds_many_connections(attacker: Attacker) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(30):
            await stack.enter_async_context(attacker.tcp())
        await asyncio.sleep(0.2)


@scenario
async def sends_a_flood_of_pings(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        for number in range(500):
            await peer.connection.ping(b"%100d" % number)
        await peer.is_closed()


@scenario
async def sends_a_message_in_crumbs(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.connection.send([b"x"] * 2000)
        await peer.is_closed()


@scenario
async def never_ends_a_first_message_of_60_mib(attacker: Attacker) -> None:
    async with attacker.stranger() as peer:
        await peer.raw(bytes(2**20))
        await peer.is_closed()


# --- before the hello is accepted -----------------------------------------------------------------


@scenario
async def sends_text(attacker: Attacker) -> None:
    await attacker.is_refused_with("hello", "bad_frame")


@scenario
async def sends_an_empty_frame(attacker: Attacker) -> None:
    await attacker.is_refused_with(b"", "bad_frame")


@scenario
async def sends_a_hello_of_17_kib(attacker: Attacker) -> None:
    async with attacker.stranger() as peer:
        await peer.raw(hello(tier="x" * 17_000))
        await peer.is_closed()


@scenario
async def sends_empty_maps(attacker: Attacker) -> None:
    await attacker.is_refused_with(
        b"\x94\xa5hello\x00\x00\xdc\x3a\x98" + b"\x80" * 15_000, "bad_frame"
    )


@scenario
async def nests_arrays(attacker: Attacker) -> None:
    await attacker.is_refused_with(b"\x91" * 10_000, "bad_frame")


@scenario
async def claims_an_array_of_four_billion(attacker: Attacker) -> None:
    await attacker.is_refused_with(b"\x94\xa5hello\x00\x00\xdd\xff\xff\xff\xff", "bad_frame")


@scenario
async def claims_a_map_of_four_billion(attacker: Attacker) -> None:
    await attacker.is_refused_with(b"\x94\xa5hello\x00\x00\xdf\xff\xff\xff\xff", "bad_frame")


@scenario
async def claims_four_gigabytes(attacker: Attacker) -> None:
    await attacker.is_refused_with(b"\x94\xa5hello\x00\x00\xc6\xff\xff\xff\xff", "bad_frame")


@scenario
async def speaks_another_version(attacker: Attacker) -> None:
    await attacker.is_refused_with(hello(version=99), "unsupported_version")


@scenario
async def sends_an_unknown_message_first(attacker: Attacker) -> None:
    async with attacker.stranger() as peer:
        await peer.body("nonsense", {}, seq=0)
        await peer.is_refused("unknown_type")


@scenario
async def is_ready_before_the_hello(attacker: Attacker) -> None:
    async with attacker.stranger() as peer:
        await peer.say(Ready(samples=1))
        await peer.is_refused("bad_message")


@scenario
async def guesses_tokens(attacker: Attacker) -> None:
    for _ in range(10):
        async with attacker.stranger() as peer:
            await peer.say(Hello(VERSION, secrets.token_hex(32), "small"))
            await peer.is_refused("bad_token")


@scenario
async def sends_a_token_of_another_kind(attacker: Attacker) -> None:
    for token in (None, 5, b"x", ["x"], "x" * 600):
        async with attacker.stranger() as peer:
            await peer.raw(hello(token=token))
            await peer.is_refused("bad_message")


@scenario
async def names_a_tier_with_control_characters(attacker: Attacker) -> None:
    token = attacker.token()
    async with attacker.stranger() as peer:
        await peer.say(Hello(VERSION, token, "x\n2026-01-01 INFO all is well\x1b[2J"))
        await peer.is_refused("unknown_tier")
    attacker.give_back(token)


@scenario
async def puts_the_token_where_the_tier_belongs(attacker: Attacker) -> None:
    token = attacker.token()
    async with attacker.stranger() as peer:
        await peer.say(Hello(VERSION, token, token))
        await peer.is_refused("unknown_tier")
    attacker.give_back(token)


@scenario
async def sends_a_hello_with_an_unknown_field(attacker: Attacker) -> None:
    await attacker.is_refused_with(hello(**{"x\n" * 30: 1}), "bad_message")


@scenario
async def sends_a_hello_with_a_number(attacker: Attacker) -> None:
    await attacker.is_refused_with(encode(Hello(VERSION, GUESS, "small"), 5, 0), "bad_frame")


@scenario
async def resumes_the_session_of_nobody(attacker: Attacker) -> None:
    async with attacker.device(session="f" * 32, last_seq=7) as peer:
        await peer.is_served()


# --- a device and its session ---------------------------------------------------------------------


@scenario
async def says_hello_twice(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Hello(VERSION, GUESS, "small"))
        await peer.is_served()


@scenario
async def says_hello_from_six_connections_at_once(attacker: Attacker) -> None:
    """The last of them stays, and the others are told."""
    token = attacker.token()
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(attacker.stranger()) for _ in range(6)]
        await asyncio.gather(*(p.say(Hello(VERSION, token, "small")) for p in peers))
        ends = await asyncio.gather(*(_end(p) for p in peers))
        assert sorted(ends) == ["replaced"] * 5 + ["served"], ends
    attacker.give_back(token)


async def _end(peer: Hostile) -> str:
    await peer.hear(Welcome)
    await asyncio.sleep(0.3)
    await peer.say(BlobGet(hash="0" * 64, offset=0))
    error: Error = await peer.hear(Error)
    return "served" if error.code == "unknown_blob" else error.code


@scenario
async def is_ready_after_bye(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Bye(reason="x"))
        await peer.say(Ready(samples=5))
        await peer.is_closed()


@scenario
async def stays_after_bye(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Bye(reason="x"))
        await peer.is_closed()


@scenario
async def says_bye_with_control_characters(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Bye(reason="done\n2026-01-01 INFO all is well\x1b[2J" * 50))
        await peer.is_closed()


@scenario
async def is_ready_again_and_again(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        for _ in range(10):
            await peer.say(Ready(samples=1))
        await peer.is_served()


@scenario
async def is_ready_with_a_tier_that_is_not_there(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Ready(samples=1, tier="nonsense"))
        await peer.is_refused("unknown_tier", "bad_message")


@scenario
async def is_ready_with_another_tier(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Ready(samples=1, tier="large"))
        await peer.is_refused("unknown_tier", "bad_message")


@scenario
async def acknowledges_what_was_never_sent(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Ready(samples=1), ack=99)
        await peer.is_refused("bad_frame")


@scenario
async def leaves_a_gap(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Ready(samples=1), seq=7)
        error: Error = await peer.hear(Error)
        assert error.code == "sequence_gap"
        await peer.is_closed()


@scenario
async def closes_in_the_middle_of_a_frame(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        frame = encode(infer(attacker, 1), 1, 0)
        head = bytes([0x82, 0x80 | 126]) + len(frame).to_bytes(2, "big") + b"\0\0\0\0"
        peer.connection.transport.write(head + frame[: len(frame) // 2])
        await asyncio.sleep(0.05)
        peer.connection.transport.abort()


@scenario
async def sends_a_frame_of_the_reserved_kind(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        peer.connection.transport.write(bytes([0x83, 0x80, 0, 0, 0, 0]))
        await peer.is_closed()


@scenario
async def sends_a_frame_without_a_mask(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        peer.connection.transport.write(bytes([0x82, 0x01, 0x00]))
        await peer.is_closed()


@scenario
async def asks_for_blobs_and_never_reads(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        peer.connection.transport.pause_reading()
        name = next(iter(attacker.manifest.blobs))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                for _ in range(20_000):
                    await peer.say(BlobGet(hash=name, offset=0))
        peer.connection.transport.abort()


@scenario
async def asks_for_blobs_that_are_not_there(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        for _ in range(50):
            await peer.say(BlobGet(hash="0" * 64, offset=2**62))
        for _ in range(50):
            assert (await peer.hear(Error)).code == "unknown_blob"


@scenario
async def asks_beyond_the_end_of_a_blob(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(BlobGet(hash=next(iter(attacker.manifest.blobs)), offset=2**62))
        assert (await peer.hear(Error)).code == "unknown_blob"


@scenario
async def reports_errors_without_end(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        for _ in range(30):
            await peer.say(Error(code="x", message="y\n" * 2000, fatal=False))
        await peer.is_refused("bad_message")


@scenario
async def sends_messages_of_the_hub(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.body("stop", {"reason": "x"})
        await peer.is_refused("bad_message")


@scenario
async def sends_a_tensor_that_claims_more_than_it_has(attacker: Attacker) -> None:
    lie = msgpack.ExtType(1, msgpack.packb(["float32", [2**30, 2**30], b"x"]))
    async with attacker.device() as peer:
        await peer.body("infer", {"request": 1, "parts": {"h.q": lie}})
        await peer.is_refused("bad_tensor")


@scenario
async def sends_a_timestamp_for_a_tensor(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.body("infer", {"request": 1, "parts": {"h.q": msgpack.Timestamp(1)}})
        await peer.is_refused("bad_frame", "bad_message")


@scenario
async def acknowledges_nothing(attacker: Attacker) -> None:
    """Answers are unsettled at the device: after a window of them the hub drops it."""
    async with attacker.device() as peer:
        for request in range(1, 40):
            await peer.say(infer(attacker, request))
        await peer.is_closed()


# --- questions ------------------------------------------------------------------------------------


@scenario
async def asks_for_a_tier_that_is_not_there(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(infer(attacker, 1, tier="nonsense"))
        await peer.is_refused("unknown_tier")


@scenario
async def asks_with_a_wrong_shape(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        parts = {n: p[..., :1] for n, p in good_activations(attacker.manifest, 1).parts.items()}
        await peer.say(Infer(request=1, parts=parts))
        await peer.is_refused("bad_tensor")


@scenario
async def asks_for_a_base_network_that_is_not_there(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(infer(attacker, 1, base=60))
        await peer.is_refused("bad_message")


@scenario
async def asks_for_more_than_full_robustness(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(infer(attacker, 1, robustness=5.0))
        await peer.is_refused("bad_message")


@scenario
async def asks_for_many_rows(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        for request in range(1, 5):
            await peer.say(infer(attacker, request, rows=2_000))
        await asyncio.sleep(0.2)


@scenario
async def asks_questions_and_leaves(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        for request in range(1, 9):
            await peer.say(infer(attacker, request, rows=100))
        peer.connection.transport.abort()


@scenario
async def asks_with_values_that_are_not_finite(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        question = infer(attacker, 1)
        parts = {n: np.full_like(p, np.nan) if p.dtype.kind == "f" else p
                 for n, p in question.parts.items()}  # fmt: skip
        await peer.say(replace(question, parts=parts))
        await peer.is_refused("not_finite")


# --- rounds ---------------------------------------------------------------------------------------


def spoiled(attacker: Attacker, number: int, scale: float, rows: int = 8) -> Activations:
    """Activations whose scales, or values, are those given."""
    good = good_activations(attacker.manifest, number, rows)
    parts = {n: np.full_like(p, scale) if p.dtype.kind == "f" else p for n, p in good.parts.items()}
    return replace(good, parts=parts)


@of_a_round
async def declines(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        await peer.say(Decline(round=task.round, reason="no\x1b[2J\n" * 100))
        await asyncio.sleep(0.2)


@scenario
async def declines_a_round_that_is_not(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(Decline(round=2**62, reason="x"))
        await peer.is_served()


@of_a_round
async def joins_a_round_and_vanishes(attacker: Attacker) -> None:
    async with attacker.member() as (peer, _):
        peer.connection.transport.abort()


@scenario
async def sends_activations_for_a_round_that_is_not(attacker: Attacker) -> None:
    async with attacker.device() as peer:
        await peer.say(good_activations(attacker.manifest, 2**40))
        await peer.is_served()


@of_a_round
async def sends_activations_that_are_nan(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        await peer.say(spoiled(attacker, task.round, float("nan")))
        await peer.is_refused("not_finite")


@of_a_round
async def sends_activations_that_overflow(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        await peer.say(spoiled(attacker, task.round, 3e38))
        await peer.is_refused("not_finite")


@of_a_round
async def sends_more_rows_than_it_has(attacker: Attacker) -> None:
    async with attacker.member(samples=4) as (peer, task):
        await peer.say(good_activations(attacker.manifest, task.round, rows=8))
        await peer.is_refused("bad_message")


@of_a_round
async def sends_labels_out_of_range(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        good = good_activations(attacker.manifest, task.round)
        await peer.say(replace(good, labels=np.full(8, 10**6)))
        await peer.is_refused("bad_labels")


@of_a_round
async def sends_labels_that_are_no_integers(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        good = good_activations(attacker.manifest, task.round)
        await peer.say(replace(good, labels=np.zeros(8, np.float32)))
        await peer.is_refused("bad_labels")


@of_a_round
async def sends_gradients_of_features_that_are_not(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        parts = good_activations(attacker.manifest, task.round).parts
        await peer.say(FeatureGradient(round=task.round, batch=0, parts=parts, labels=1))
        await peer.is_refused("bad_message")


@of_a_round
async def sends_an_update_that_is_nan(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        update = good_update(attacker.manifest, task.round)
        await peer.say(_filled(update, np.nan))
        await peer.is_refused("not_finite")


@of_a_round
async def sends_an_update_with_other_names(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        update = good_update(attacker.manifest, task.round)
        await peer.say(replace(update, tensors={"x\n": np.zeros(3, np.float32)}))
        await peer.is_refused("bad_tensor")


@of_a_round
async def sends_a_part_of_an_update_twice(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        update = replace(good_update(attacker.manifest, task.round), done=False)
        await peer.say(update)
        await peer.say(update)
        await peer.is_refused("bad_tensor")


@of_a_round
async def counts_other_samples_in_the_update(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        await peer.say(replace(good_update(attacker.manifest, task.round), samples=2**62))
        await peer.is_refused("bad_message")


@of_a_round
async def sends_an_update_before_its_part_is_over(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        await peer.say(replace(good_update(attacker.manifest, task.round), tensors={}))
        await peer.is_refused("bad_tensor")


@of_a_round
async def sends_metrics_whose_sum_is_infinite(attacker: Attacker) -> None:
    """They count as the largest metrics that are believed; the record stays JSON."""
    async with attacker.member() as (peer, task):
        update = good_update(attacker.manifest, task.round)
        await peer.say(replace(update, metrics={"loss": 1e308, "accuracy": 1e308}))
        await asyncio.sleep(0.2)


@of_a_round
async def sends_metrics_that_are_no_numbers(attacker: Attacker) -> None:
    async with attacker.member() as (peer, task):
        await peer.body(
            "update",
            {"round": task.round, "tensors": {}, "done": False, "samples": 1,
             "metrics": {"loss": float("inf")}},
            seq=2,
        )  # fmt: skip
        await peer.is_refused("bad_message")


def _filled(update: Update, value: float) -> Update:
    return replace(update, tensors={n: np.full_like(t, value) for n, t in update.tensors.items()})
