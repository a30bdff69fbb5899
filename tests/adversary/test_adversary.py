"""A hostile peer attacks a hub that serves an honest job: the job ends, and ends as well."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.device import Device
from server_hub.gateway.tokens import TokenFile
from tests.adversary.peer import Attacker
from tests.adversary.scenarios import OF_ROUNDS, SCENARIOS, attempt
from tests.lib.harness import examples
from tests.lib.tasks import run

ROOT = Path(__file__).parents[2]
ROUNDS = 12
AT_ONCE = 6
"""Scenarios that run at the same time."""


@dataclass
class HubProcess:
    """A hub in a process of its own."""

    process: asyncio.subprocess.Process
    url: str
    folder: Path

    async def stats(self) -> dict[str, Any]:
        """What :mod:`tests.adversary.hub_process` answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), 30)
        assert line, "the hub has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def accuracy(self) -> float:
        """Accuracy through the hub after the last round, of the mean of the tiers."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1], parse_constant=_no_constant)["accuracy"]
        return statistics.mean(tier["through_hub"] for tier in last.values())

    async def rounds_done(self, count: int) -> None:
        """Wait for a number of rounds."""
        while (await self.stats())["rounds"] < count:
            await asyncio.sleep(0.2)


def _no_constant(text: str) -> float:
    raise AssertionError(f"{text} is no JSON")


@asynccontextmanager
async def hub_process(bundles: BundleIndex, folder: Path, rounds: int) -> AsyncIterator[HubProcess]:
    folder.mkdir(exist_ok=True)
    with open(folder / "log.txt", "wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.adversary.hub_process",
            str(bundles.folder), str(folder), str(rounds),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, cwd=ROOT,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            url = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
            assert url.startswith("ws://"), (folder / "log.txt").read_text()
            yield HubProcess(process, url, folder)
            assert process.stdin is not None
            process.stdin.close()
            await asyncio.wait_for(process.wait(), 20)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def honest_job(hub: HubProcess, seed: int) -> None:
    """Three devices take part until the job is over."""
    tokens = TokenFile(hub.folder / "tokens.toml")

    async def one(number: int) -> None:
        name = f"honest-{number}"
        device = await Device.connect(
            hub.url, token=tokens.issue(name), tier="small",
            data=examples(96, seed=100 * seed + number), cache=hub.folder / "cache",
        )  # fmt: skip
        async with device:
            report = await device.train()
            assert report.reason == "the job is finished"

    await asyncio.gather(*(one(number) for number in range(3)))


def attacker_of(hub: HubProcess, bundles: BundleIndex) -> Attacker:
    tokens = TokenFile(hub.folder / "tokens.toml")
    # many, so that a name that has missed rounds, and is drawn less often, is not needed again
    issued = [tokens.issue(f"mallory-{number}") for number in range(2 * len(SCENARIOS))]
    return Attacker(hub.url, issued, bundles.manifest("small"))


async def attack(attacker: Attacker, names: list[str], at_once: int = AT_ONCE) -> dict[str, str]:
    """Run scenarios, a few at once; returns what went wrong by scenario."""
    wrong: dict[str, str] = {}
    slots = asyncio.Semaphore(at_once)

    async def one(name: str) -> None:
        async with slots:
            try:
                async with asyncio.timeout(60):
                    await attempt(SCENARIOS[name], attacker)
            except Exception as error:
                wrong[name] = f"{type(error).__name__}: {error}"

    await asyncio.gather(*(one(name) for name in names))
    return wrong


def test_there_are_sixty_scenarios() -> None:
    assert len(SCENARIOS) >= 60


def test_an_honest_job_goes_on_under_attack(bundles: BundleIndex, tmp_path: Path) -> None:
    """Every scenario ends as it must, the job ends, the event loop is never late for long."""

    async def test() -> None:
        async with hub_process(bundles, tmp_path / "attacked", ROUNDS) as hub:
            job = asyncio.create_task(honest_job(hub, seed=1))
            await hub.rounds_done(1)
            await hub.stats()
            attacker = attacker_of(hub, bundles)
            wrong = await attack(attacker, sorted(SCENARIOS))
            assert not wrong, json.dumps(wrong, indent=1)
            stats = await hub.stats()
            await job
            assert stats["p99_ms"] < 50, stats
            # it has learned: undisturbed jobs end between 0.42 and 0.64, by chance it is 0.1; the
            # slow test below compares the two
            assert hub.accuracy() > 0.3
        log = (hub.folder / "log.txt").read_text()
        assert "Traceback" not in log, log
        assert not any(token in log for token in attacker.tokens)
        assert "\x1b" not in log
        assert not [line for line in log.splitlines() if line.startswith("2026-01-01")]

    run(test(), 300)


@pytest.mark.slow
def test_an_attacked_job_ends_as_well_as_others(bundles: BundleIndex, tmp_path: Path) -> None:
    """Its accuracy is within two standard deviations of five undisturbed jobs."""

    async def job(seed: int, attacked: bool) -> float:
        folder = tmp_path / f"{seed}-{attacked}"
        async with hub_process(bundles, folder, ROUNDS) as hub:
            job = asyncio.create_task(honest_job(hub, seed))
            if attacked:
                await hub.rounds_done(1)
                attacker, names = attacker_of(hub, bundles), sorted(SCENARIOS)
                while not job.done():
                    await attack(attacker, names)
            await job
            return hub.accuracy()

    async def test() -> None:
        calm = [await job(seed, attacked=False) for seed in range(1, 6)]
        attacked = await job(1, attacked=True)
        mean, deviation = statistics.mean(calm), max(statistics.stdev(calm), 0.01)
        assert attacked > mean - 2 * deviation, (calm, attacked)

    run(test(), 900)


@pytest.mark.slow
def test_an_attack_that_goes_on_costs_no_memory(bundles: BundleIndex, tmp_path: Path) -> None:
    """After 100 repetitions the hub has at most 5 MB more than after 10."""
    names = sorted(SCENARIOS.keys() - OF_ROUNDS)

    async def test() -> None:
        async with hub_process(bundles, tmp_path / "hub", 10**6) as hub:
            attacker = attacker_of(hub, bundles)
            after = {}
            for repetition in range(1, 101):
                await attack(attacker, names, at_once=len(names))
                if repetition in (10, 100):
                    after[repetition] = (await hub.stats())["resident_mb"]
            assert after[100] - after[10] < 5, after

    run(test(), 1500)
