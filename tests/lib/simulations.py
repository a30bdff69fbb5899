"""Helpers that run, interrupt and compare simulated jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server_hub.simulation.clock import VirtualLoop
from server_hub.simulation.job import DeviceRuntime, Job
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import RoundRecord


def simulate(
    job: Job,
    folder: Path,
    runtime: DeviceRuntime = "torch",
    on_round: Callable[[RoundRecord], None] = lambda record: None,
) -> list[RoundRecord]:
    """Run a job, or resume it."""
    with in_time(), Simulation(job, folder, runtime) as simulation:
        return simulation.run(on_round)


@contextmanager
def in_time(virtual_s: float = 20_000.0) -> Iterator[None]:
    """Fail the test if a run has not ended after ``virtual_s`` virtual seconds."""
    time, over = VirtualLoop.time, False

    def limited(self: VirtualLoop) -> float:
        nonlocal over
        now = time(self)
        if now > virtual_s and not over:
            over = True  # once: the loop needs it to clean up
            raise AssertionError(f"the run has no end, not in {virtual_s:g} virtual seconds")
        return now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualLoop, "time", limited)
        yield


class Interrupted(Exception):
    """Raised to interrupt a run in a test."""


def stop_after(round_number: int) -> Callable[[RoundRecord], None]:
    """For ``on_round``: raises :class:`Interrupted` after a round."""

    def on_round(record: RoundRecord) -> None:
        if record.round == round_number:
            raise Interrupted

    return on_round


def assert_alike(found: list[RoundRecord], wanted: list[RoundRecord]) -> None:
    """Check that two runs have equal rounds, except for times and handshakes.

    Equally fast devices may finish in another order, which changes the rounding of sums.
    """
    for a, b in zip(found, wanted, strict=True):
        assert (a.round, a.devices, a.dropped) == (b.round, b.devices, b.dropped)
        assert a.local_loss == pytest.approx(b.local_loss, rel=1e-5)
        assert a.trunk_loss == pytest.approx(b.trunk_loss, rel=1e-5)
        assert a.trunk_steps == b.trunk_steps
        assert a.accuracy.keys() == b.accuracy.keys()
        for tier, paths in a.accuracy.items():
            assert paths == pytest.approx(b.accuracy[tier], abs=1.5 / 60)
        for kind in ("activations", "update"):
            assert a.bytes[kind] == b.bytes[kind]
        for count in ("device_flop", "trunk_flop"):
            assert a.costs[count] == b.costs[count]
