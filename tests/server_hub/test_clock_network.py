"""The virtual clock and the simulated network, against closed forms."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_sdk.errors import LinkClosed
from edge_sdk.protocol.channel import Channel, Delivery
from edge_sdk.protocol.messages import Infer, Update
from edge_sdk.transport.session import Session
from server_hub.simulation import clock
from server_hub.simulation.clock import Stuck, VirtualLoop
from server_hub.simulation.devices import presences
from server_hub.simulation.job import FleetTier
from server_hub.simulation.network import Network, SimulatedLink

# --- clock ----------------------------------------------------------------------------------------


def test_a_clock_starts_where_it_is_told_and_jumps_over_waiting() -> None:
    async def main(loop: VirtualLoop) -> tuple[float, float]:
        before = loop.time()
        await asyncio.sleep(1e6)
        return before, loop.time()

    real = time.perf_counter()
    assert clock.run(main, start=50.0) == (50.0, 1_000_050.0)
    assert time.perf_counter() - real < 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_timers_end_in_the_order_of_their_times_and_exactly_then(delays: list[int]) -> None:
    async def main(loop: VirtualLoop) -> list[tuple[float, int]]:
        woken: list[tuple[float, int]] = []

        async def sleeper(delay: int) -> None:
            await asyncio.sleep(delay)
            woken.append((loop.time(), delay))

        await asyncio.gather(*map(sleeper, delays))
        return woken

    assert clock.run(main) == [(float(delay), delay) for delay in sorted(delays)]


def test_many_small_waits_and_waits_longer_than_a_day_are_not_lost() -> None:
    async def main(loop: VirtualLoop) -> float:
        for _ in range(1000):
            await asyncio.sleep(0.001)
        await asyncio.sleep(10 * 24 * 3600)
        return loop.time()

    assert clock.run(main) == pytest.approx(864_001.0, abs=1e-6)


def test_a_timeout_counts_virtual_seconds() -> None:
    async def main(loop: VirtualLoop) -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await asyncio.Event().wait()
        return loop.time()

    assert clock.run(main) == 3600.0


def test_work_for_a_thread_runs_at_once_and_its_result_comes_when_it_was_charged_for() -> None:
    async def main(loop: VirtualLoop) -> list[Any]:
        seen: list[Any] = []

        def work(name: str, seconds: Sequence[float]) -> str:
            seen.append((name, "runs", loop.time()))
            for part in seconds:
                loop.charge(part)
            return name

        async def wait(name: str, *seconds: float) -> None:
            seen.append((await asyncio.to_thread(work, name, seconds), "is back", loop.time()))

        await asyncio.gather(wait("long", 3.0, 2.0), wait("short", 1.5), wait("free"))
        await wait("later")  # time that was charged before is not charged again
        return seen

    assert clock.run(main) == [
        ("long", "runs", 0.0),
        ("short", "runs", 0.0),
        ("free", "runs", 0.0),
        ("free", "is back", 0.0),
        ("short", "is back", 1.5),
        ("long", "is back", 5.0),
        ("later", "runs", 5.0),
        ("later", "is back", 5.0),
    ]


def test_work_that_fails_says_so_to_whoever_waits_for_it() -> None:
    async def main(loop: VirtualLoop) -> None:
        def fail() -> None:
            loop.charge(4.0)
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await asyncio.to_thread(fail)

    clock.run(main)


def test_work_that_is_interrupted_interrupts_the_run() -> None:
    async def main(loop: VirtualLoop) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        await asyncio.to_thread(interrupted)

    with pytest.raises(KeyboardInterrupt):
        clock.run(main)


def test_a_waiter_that_is_cancelled_takes_nobody_along() -> None:
    async def main(loop: VirtualLoop) -> tuple[bool, float, str]:
        def work(seconds: float) -> str:
            loop.charge(seconds)
            return "done"

        waiter = asyncio.create_task(asyncio.to_thread(work, 5.0))
        other = asyncio.create_task(asyncio.to_thread(work, 7.0))
        await asyncio.sleep(1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        cancelled_at = loop.time()
        return waiter.cancelled(), cancelled_at, await other

    assert clock.run(main) == (True, 1.0, "done")


def test_a_timeout_ends_before_the_work_that_takes_longer() -> None:
    async def main(loop: VirtualLoop) -> float:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(loop.charge, 9.0), 2.0)
        return loop.time()

    assert clock.run(main) == 2.0


def test_a_run_in_which_everybody_waits_is_stuck_and_ends() -> None:
    cleaned_up = []

    async def waiter() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(True)

    async def main(loop: VirtualLoop) -> None:
        await asyncio.gather(waiter(), waiter())

    with pytest.raises(Stuck, match="never comes"):
        clock.run(main)
    assert cleaned_up == [True, True]


def test_an_error_in_the_run_is_the_callers() -> None:
    async def main(loop: VirtualLoop) -> None:
        await asyncio.sleep(5)
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        clock.run(main)


# --- network --------------------------------------------------------------------------------------


def on_clock(main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine on a virtual clock; return its result."""
    return clock.run(main)


async def until_closed(link: SimulatedLink) -> list[tuple[float, bytes | str]]:
    """Return all arrivals with their times until the link ends; the end has an empty frame."""
    loop, arrived = asyncio.get_running_loop(), list[tuple[float, bytes | str]]()
    while True:
        try:
            arrived.append(await _timed(link))
        except LinkClosed:
            return [*arrived, (loop.time(), b"")]


async def _timed(link: SimulatedLink) -> tuple[float, bytes | str]:
    frame = await link.receive()
    return asyncio.get_running_loop().time(), frame


def closed_form(
    sent: Sequence[tuple[float, int]], bytes_per_second: float, latency: float
) -> list[float]:
    """Return the arrival times of frames ``(time, size)`` that one end sends in this order."""
    free = 0.0
    arrivals = []
    for at, size in sent:
        free = max(free, at) + size / bytes_per_second
        arrivals.append(free + latency)
    return arrivals


FRAMES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5000)), min_size=1, max_size=12)
RATES = st.one_of(st.none(), st.floats(0.001, 100))


@settings(deadline=None, max_examples=100)
@given(FRAMES, RATES, st.floats(0, 2000))
@example([(0, 1000), (0, 1000), (0, 1)], 0.008, 0.0)
@example([(0, 1), (0, 2), (0, 3)], None, 0.0)
@example([(0, 1), (0, 2), (0, 3)], None, 250.0)
def test_frames_arrive_when_the_closed_form_says_whoever_sends_them(
    frames: list[tuple[int, int]], mbit: float | None, latency_ms: float
) -> None:
    """Every frame is sent by its own task, so that several are sent at the same time."""
    frames = sorted(frames, key=lambda frame: frame[0])
    network = Network(uplink_mbit=mbit, latency_ms=latency_ms)

    async def main(loop: VirtualLoop) -> list[tuple[float, bytes | str]]:
        device, hub = SimulatedLink.pair(network)

        arrived = asyncio.create_task(until_closed(hub))
        senders = []
        for number, (at, size) in enumerate(frames):
            await asyncio.sleep(at - loop.time())
            senders.append(asyncio.create_task(device.send(bytes([number]) * size)))
        await asyncio.gather(*senders)
        await device.close()
        return await arrived

    arrived = on_clock(main)
    rate = math.inf if mbit is None else mbit * 1e6 / 8
    wanted = closed_form([(float(at), size) for at, size in frames], rate, latency_ms / 1000)
    assert [frame for _, frame in arrived[:-1]] == [
        bytes([number]) * size for number, (_, size) in enumerate(frames)
    ]
    assert [at for at, _ in arrived[:-1]] == pytest.approx(wanted, rel=1e-9, abs=1e-8)
    assert arrived[-1][0] == pytest.approx(wanted[-1], rel=1e-9, abs=1e-8), "then it is closed"


@settings(deadline=None, max_examples=50)
@given(FRAMES, RATES, st.floats(0, 500))
def test_a_sender_goes_on_once_its_frame_is_on_the_wire(
    frames: list[tuple[int, int]], mbit: float | None, latency_ms: float
) -> None:
    """There is one sender, as in a session; the pauses between its frames are given."""

    async def main(loop: VirtualLoop) -> tuple[list[float], list[float]]:
        device, hub = SimulatedLink.pair(Network(downlink_mbit=mbit, latency_ms=latency_ms))
        reader = asyncio.create_task(until_closed(device))
        given_at = []
        for pause, size in frames:
            await asyncio.sleep(pause)
            given_at.append(loop.time())
            await hub.send(bytes(size))
            rate = math.inf if mbit is None else mbit * 1e6 / 8
            assert loop.time() == pytest.approx(given_at[-1] + size / rate, abs=1e-8)
        await hub.close()
        return given_at, [at for at, _ in await reader]

    given_at, arrived = on_clock(main)
    sent = [(at, size) for at, (_, size) in zip(given_at, frames, strict=True)]
    rate = math.inf if mbit is None else mbit * 1e6 / 8
    wanted = closed_form(sent, rate, latency_ms / 1000)
    assert arrived[:-1] == pytest.approx(wanted, rel=1e-9, abs=1e-8)


def test_the_two_directions_do_not_wait_for_each_other() -> None:
    async def main(loop: VirtualLoop) -> tuple[float, float]:
        device, hub = SimulatedLink.pair(Network(0.008, 0.08, 100))
        up, down = asyncio.create_task(_timed(hub)), asyncio.create_task(_timed(device))
        await asyncio.gather(device.send(bytes(1000)), hub.send(bytes(1000)))
        return (await up)[0], (await down)[0]

    up, down = on_clock(main)
    assert up == pytest.approx(1.0 + 0.1)
    assert down == pytest.approx(0.1 + 0.1)


def test_close_lets_what_was_sent_arrive_first_and_ends_both_ends() -> None:
    async def main(loop: VirtualLoop) -> list[tuple[float, bytes | str]]:
        device, hub = SimulatedLink.pair(Network(latency_ms=500))
        own = asyncio.create_task(device.receive())
        await asyncio.sleep(0)
        for frame in (b"one", b"two"):
            await device.send(frame)
        await device.close()
        await device.close()  # a second close has no effect
        for use in (own, device.receive(), device.send(b"more")):
            with pytest.raises(LinkClosed):
                await use
        assert loop.time() == 0.0
        arrived = await until_closed(hub)
        for call in (hub.receive(), hub.send(b"more")):
            with pytest.raises(LinkClosed):
                await call
        return arrived

    assert on_clock(main) == [(0.5, b"one"), (0.5, b"two"), (0.5, b"")]


def test_cut_loses_what_is_under_way_and_both_ends_see_it_at_once() -> None:
    async def main(loop: VirtualLoop) -> None:
        device, hub = SimulatedLink.pair(Network(0.008, latency_ms=500))
        reader = asyncio.create_task(until_closed(hub))
        other = asyncio.create_task(device.receive())
        await device.send(bytes(1000))  # arrives at 1.5
        await device.send(bytes(1000))  # would arrive at 2.5
        sending = asyncio.create_task(device.send(bytes(1000)))
        await asyncio.sleep(0.2)
        device.cut()
        assert loop.time() == pytest.approx(2.2)
        with pytest.raises(LinkClosed):
            await other
        assert [at for at, _ in await reader] == pytest.approx([1.5, 2.2])
        with pytest.raises(LinkClosed):
            await sending
        for call in (hub.send(b"x"), hub.receive(), device.send(b"x"), device.receive()):
            with pytest.raises(LinkClosed):
                await call
        device.cut()  # a second cut has no effect
        await hub.close()

    on_clock(main)


def test_cut_after_a_close_ends_the_other_end() -> None:
    async def main(loop: VirtualLoop) -> list[tuple[float, bytes | str]]:
        device, hub = SimulatedLink.pair(Network(latency_ms=500))
        reader = asyncio.create_task(until_closed(hub))
        await device.send(b"lost")
        await device.close()
        await asyncio.sleep(0.1)
        device.cut()
        return await reader

    assert on_clock(main) == [(0.1, b"")]


def test_a_long_message_takes_the_time_of_its_bytes_and_a_cut_costs_what_was_under_way() -> None:
    """20 MB at 100 kB/s take 200 s; no silence ends the link, and a question goes between."""

    async def main(loop: VirtualLoop) -> None:
        agreed = frozenset({"pieces"})
        device, hub = (Session(Channel(extensions=agreed)) for _ in range(2))
        arrived: dict[str, float] = {}

        def handle(delivery: Delivery) -> None:
            arrived[delivery.message.TYPE] = loop.time()
            hub.settle(delivery.seq)

        network = Network(uplink_mbit=0.8, latency_ms=50)
        await device.send(Update(1, {"w": np.zeros(20_000_000, np.uint8)}, True, 1, {}))
        for seconds in (60.0, 60.0, 1000.0):
            ours, theirs = SimulatedLink.pair(network)
            settled = device.channel.settled, hub.channel.settled
            serving = [
                asyncio.create_task(device.run(ours, settled[1], lambda d: None)),
                asyncio.create_task(hub.run(theirs, settled[0], handle)),
            ]
            await asyncio.sleep(1.0)
            if "infer" not in arrived:
                await device.send(Infer(1, {}))
            await asyncio.sleep(seconds - 1.0)
            ours.cut()
            await asyncio.gather(*serving, return_exceptions=True)
        assert arrived["infer"] == pytest.approx(1.0, abs=1.5)
        assert arrived["update"] == pytest.approx(200.0, abs=3.0)

    clock.run(main)


def test_lost_packets_bound_the_rate_as_mathis_and_others_say() -> None:
    """The bound is 1460 bytes * 1.22 per round trip of 0.1 s, over the root of 0.0001."""
    lossy = Network(100, 10, latency_ms=50, loss=1e-4)
    assert lossy.bytes_per_second(lossy.uplink_mbit) == pytest.approx(1_781_200)
    assert lossy.bytes_per_second(lossy.downlink_mbit) == pytest.approx(1_250_000), (
        "the link is less"
    )
    assert lossy.bytes_per_second(None) == pytest.approx(1_781_200)
    assert Network(latency_ms=50).bytes_per_second(None) == math.inf
    four_times = Network(latency_ms=50, loss=4e-4)
    assert four_times.bytes_per_second(None) == pytest.approx(1_781_200 / 2)
    twice_as_far = Network(latency_ms=100, loss=1e-4)
    assert twice_as_far.bytes_per_second(None) == pytest.approx(1_781_200 / 2)


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ({"uplink_mbit": 0.0}, "uplink_mbit"),
        ({"uplink_mbit": math.nan}, "uplink_mbit"),
        ({"downlink_mbit": -1.0}, "downlink_mbit"),
        ({"latency_ms": -1.0}, "latency_ms"),
        ({"latency_ms": math.nan}, "latency_ms"),
        ({"latency_ms": math.inf}, "latency_ms"),
        ({"latency_ms": 10.0, "loss": 1.0}, "loss"),
        ({"latency_ms": 10.0, "loss": -0.1}, "loss"),
        ({"latency_ms": 10.0, "loss": math.nan}, "loss"),
        ({"loss": 0.1}, "latency_ms"),
    ],
)
def test_a_network_that_cannot_be_is_refused(table: dict[str, float], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Network(**table)


# --- times online and offline ---------------------------------------------------------------------


def visits(tier: FleetTier, seed: str, count: int) -> list[tuple[float, float]]:
    """Return the first times of a device online."""
    return list(itertools.islice(presences(tier, seed), count))


def test_a_device_without_absences_is_there_from_the_start_to_the_end() -> None:
    assert list(presences(FleetTier(clients=1, cut=1), "0/a")) == [(0.0, math.inf)]


def test_presences_follow_each_other_and_depend_on_the_seed_alone() -> None:
    tier = FleetTier(clients=1, cut=1, online_s=30, offline_s=10)
    own = visits(tier, "7/a", 500)
    assert own == visits(tier, "7/a", 500)
    assert own != visits(tier, "7/b", 500)
    assert own != visits(tier, "8/a", 500)
    times = [at for visit in own for at in visit]
    assert times == sorted(times)
    assert all(start < end for start, end in own)


def test_times_of_presence_and_absence_are_exponential_with_the_means_that_are_given() -> None:
    """Bounds are four standard errors; the mean of an exponential equals its deviation."""
    tier, count = FleetTier(clients=1, cut=1, online_s=30, offline_s=10), 4000
    own = visits(tier, "0/a", count)
    there = [end - start for start, end in own]
    away = [after[0] - before[1] for before, after in itertools.pairwise(own)]
    for times, mean in ((there, 30.0), (away, 10.0)):
        assert statistics.mean(times) == pytest.approx(mean, abs=4 * mean / math.sqrt(count))
        longer = sum(t > mean for t in times) / len(times)
        assert longer == pytest.approx(math.exp(-1), abs=4 * 0.5 / math.sqrt(count))


@pytest.mark.parametrize("at", [0.0, 5.0, 200.0])
def test_as_many_devices_are_there_at_the_start_as_at_any_time(at: float) -> None:
    """30 of 40 seconds are three quarters; the remaining time does not depend on the past."""
    tier, count = FleetTier(clients=1, cut=1, online_s=30, offline_s=10), 2000
    left = []
    for device in range(count):
        start, end = next(v for v in presences(tier, f"0/{device}") if v[1] > at)
        if start <= at:
            left.append(end - at)
    error = math.sqrt(0.75 * 0.25 / count)
    assert len(left) / count == pytest.approx(0.75, abs=4 * error)
    assert statistics.mean(left) == pytest.approx(30, abs=4 * 30 / math.sqrt(len(left)))


def test_a_device_that_is_never_away_only_loses_its_link() -> None:
    own = visits(FleetTier(clients=1, cut=1, online_s=30), "0/a", 100)
    assert own[0][0] == 0.0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(own))
