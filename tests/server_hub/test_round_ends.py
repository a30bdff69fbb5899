"""When rounds and jobs end: killed, silent and slow devices, devices that send on, that stay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay import ReplayDevice, Replayer
from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import HubError
from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import BlobGet, Decline, Error, Infer, Ready, Round, Stop, Welcome
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.method import always
from server_hub.methods.settings import LocalTraining
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation import devices
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.storage.run_folder import RoundRecord
from server_hub.trunk.errors import TrunkFailed, TrunkRefused
from server_hub.trunk.interface import StepInput, StepReport
from server_hub.trunk.settings import TrunkTraining
from tests.lib.harness import examples, hub_config, running_hub
from tests.lib.models import BUILD
from tests.lib.raw_client import GOOD, RawClient, good_activations, good_update, raw
from tests.lib.simulations import simulate

# --- on the virtual clock -------------------------------------------------------------------------


def fleet(counts: list[int], slower: float, quorum: float = 0.8, rounds: int = 3) -> Job:
    """Return a job with tiers of some numbers of devices, each ``slower`` than the one before."""
    tiers = {
        f"tier{i}": FleetTier(clients=count, cut=1, gflops=0.0002 / slower**i, latency_ms=20)
        for i, count in enumerate(counts)
    }
    return Job(
        model=BUILD,
        data=DataTable("digits", train=8 * sum(counts), test=20),
        tiers=tiers,
        rounds=RoundsTable(count=rounds, quorum=quorum),
        local=LocalTraining(batch_size=8),
        evaluate_every=rounds,
    )


def kill(monkeypatch: pytest.MonkeyPatch, name: str, at: float) -> None:
    """Let a simulated device go offline at a time, for good."""
    always = devices.presences

    def presences(tier: FleetTier, seed: str) -> Iterator[tuple[float, float]]:
        if seed.partition("/")[2] == name:
            return iter([(0.0, at)])
        return always(tier, seed)

    monkeypatch.setattr(devices, "presences", presences)


THIRTY = fleet([20, 10], 1.6)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[RoundRecord]:
    """The undisturbed rounds of thirty devices of two speeds."""
    return simulate(THIRTY, tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.parametrize("part", [0.5, 0.95])
def test_one_killed_device_of_thirty_costs_a_round_no_more_than_a_fifth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calm: list[RoundRecord], part: float
) -> None:
    assert all(record.devices == 30 for record in calm)
    before, undisturbed = calm[0].clock, calm[1].seconds
    assert undisturbed > 5
    kill(monkeypatch, "tier1-4", before + part * undisturbed)
    records = simulate(THIRTY, tmp_path / "killed")
    assert records[0].devices == 30
    assert records[1].dropped == {"tier1-4": "it has lost its connection"}
    assert records[1].seconds <= 1.2 * undisturbed
    assert records[2].devices == 29
    assert records[2].seconds <= 1.2 * undisturbed


def test_without_a_quorum_a_killed_device_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(monkeypatch, "tier0-2", 2.0)
    records = simulate(fleet([3], 1.0, quorum=1.0, rounds=1), tmp_path / "run")
    assert records[0].seconds > 60


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [8, 2]])
def test_devices_that_are_slower_lose_nothing(tmp_path: Path, counts: list[int]) -> None:
    task = fleet(counts, 1.9, rounds=1)
    (record,) = simulate(task, tmp_path / "quorum")
    assert (record.devices, record.dropped) == (sum(counts), {})
    (everybody,) = simulate(replace(task, rounds=RoundsTable(1)), tmp_path / "all")
    assert record.clock == everybody.clock
    assert record.trunk_loss == pytest.approx(everybody.trunk_loss, rel=1e-5)


def test_a_device_that_is_much_slower_than_the_quorum_is_not_waited_for(tmp_path: Path) -> None:
    (record,) = simulate(fleet([9, 1], 20.0, rounds=1), tmp_path / "run")
    assert record.dropped.keys() == {"tier1-1"}
    assert "9 of 10" in record.dropped["tier1-1"]
    (alone,) = simulate(fleet([9], 1.0, rounds=1), tmp_path / "alone")
    assert record.seconds == pytest.approx(alone.seconds + max(alone.seconds, 10), rel=0.1)


# --- over sockets ---------------------------------------------------------------------------------


def test_a_killed_connection_does_not_hold_a_round_of_thirty(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """With the defaults, and thirty devices that take two seconds for a round."""
    took, middle = 2.0, 1.0
    manifest = bundles.manifest("small")
    alone = RoundRules(count=3, min_devices=30)
    config = hub_config(tmp_path, bundles, rounds=alone, local=LocalTraining(batch_size=8))

    async def device(url: str, token: str, killed_in: int | None) -> None:
        async with raw(url) as connection:
            client = RawClient(connection)
            task = await client.join(token)
            while True:
                await client.say(good_activations(manifest, task.round))
                if task.round == killed_in:
                    await asyncio.sleep(middle)
                    connection.transport.abort()
                    return
                await asyncio.sleep(took)
                await client.say(good_update(manifest, task.round))
                if task.round == 3:
                    await client.hear(Stop)
                    return
                task = await client.hear(Round)

    async def job() -> None:
        tokens = TokenFile(config.tokens)
        secrets = [tokens.issue(f"device-{number}") for number in range(30)]
        async with running_hub(config) as (hub, url), asyncio.TaskGroup() as group:
            for number, secret in enumerate(secrets):
                group.create_task(device(url, secret, 2 if number == 7 else None))
            await hub.wait_until(lambda: hub.rounds.number == 1)
            hub.rounds.rules = replace(alone, min_devices=1)
            await hub.wait_until(lambda: len(hub.run.records) == 3)
            calm, killed, after = hub.run.records
            assert (calm.devices, killed.devices, after.devices) == (30, 29, 29)
            assert killed.dropped.keys() == {"device-7"}
            assert killed.seconds <= 1.2 * calm.seconds
            assert after.seconds <= 1.2 * calm.seconds

    asyncio.run(asyncio.wait_for(job(), 60))


def test_a_round_ends_at_its_deadline_though_a_device_sends_on(
    tmp_path: Path, bundles: BundleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub has taken is trained on; what comes later is not. The device does not leave."""
    manifest, deadline = bundles.manifest("small"), 1.0
    config = hub_config(
        tmp_path,
        bundles,
        rounds=RoundRules(count=1, min_devices=2, deadline_s=deadline),
        trunk=TrunkTraining(device="cpu", max_rows=8, threads=1),
        leave_s=0.5,
    )
    tokens = TokenFile(config.tokens)
    talker = ReplayDevice("talker", "small", tokens.issue("talker"))
    quiet = tokens.issue("quiet")
    message = good_activations(manifest, 0)
    batches = [Batch(message.parts, message.labels)] * 1000

    async def job() -> None:
        async with running_hub(config) as (hub, url):
            step = hub.trunk.step

            async def slow(group: list[StepInput]) -> StepReport:
                await asyncio.sleep(0.02)
                return await step(group)

            monkeypatch.setattr(hub.trunk, "step", slow)
            talking = asyncio.create_task(Replayer(url, talker, batches, []).run())
            async with raw(url) as connection:
                client = RawClient(connection)
                task = await client.join(quiet)
                await client.say(good_update(manifest, task.round))
                await hub.wait_until(lambda: len(hub.run.records) == 1)
                (record,) = hub.run.records
                assert (record.devices, list(record.dropped)) == (1, ["talker"])
                assert deadline <= record.seconds < deadline + 1.0
                assert 10 < record.trunk_steps < 100
            with pytest.raises(HubError, match="the hub ends"):
                await asyncio.wait_for(talking, 10)

    asyncio.run(asyncio.wait_for(job(), 40))


def test_when_all_decline_rounds_come_less_often_until_a_new_device_is_ready(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
    tokens = TokenFile(config.tokens)
    tired, fresh = tokens.issue("tired"), tokens.issue("fresh")

    async def decline(client: RawClient, task: Round) -> None:
        while True:
            await client.say(Decline(round=task.round, reason="battery"))
            task = await client.hear(Round)

    async def job() -> None:
        async with running_hub(config) as (hub, url), AsyncExitStack() as stack:
            client = RawClient(await stack.enter_async_context(raw(url)))
            declining = asyncio.create_task(decline(client, await client.join(tired)))
            await asyncio.sleep(1.8)
            assert hub.rounds.number == 3, "at 0, 0.5 and 1.5 seconds"
            other = RawClient(await stack.enter_async_context(raw(url)))
            async with asyncio.timeout(1):
                task = await other.join(fresh)
            await other.say(good_update(bundles.manifest("small"), task.round))
            assert (await other.hear(Stop)).reason == "the job is finished"
            declining.cancel()

    asyncio.run(asyncio.wait_for(job(), 30))


def test_a_connection_that_stays_does_not_keep_a_finished_hub(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """One that still fetches blobs does, for a while; one that is silent does not."""
    manifest = bundles.manifest("small")
    config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1), leave_s=0.5)
    token = TokenFile(config.tokens).issue("phone")

    async def job() -> None:
        async with running_hub(config) as (_, url), raw(url) as connection:
            client = RawClient(connection)
            task = await client.join(token)
            await client.say(good_update(manifest, task.round))
            stop = await client.hear(Stop)
            for _ in range(8):
                await asyncio.sleep(0.2)
                await client.say(BlobGet(hash=stop.state, offset=0))
            began = time.perf_counter()
            assert await client.closed()
            assert 0.2 < time.perf_counter() - began < 3

    asyncio.run(asyncio.wait_for(job(), 30))


# --- requests that fail ---------------------------------------------------------------------------


def test_a_question_that_the_trunk_cannot_answer_ends_one_session(
    tmp_path: Path, bundles: BundleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is told to try later, and answers alone; the job goes on with it."""
    config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
    token = TokenFile(config.tokens).issue("phone")

    async def fail(query: object) -> None:
        raise RuntimeError("out of memory")

    async def job() -> None:
        async with running_hub(config) as (hub, url):
            monkeypatch.setattr(hub.trunk, "answer", fail)
            data = examples(16)
            async with await Device.connect(
                url, token=token, tier="small", data=data, cache=tmp_path / "cache"
            ) as device:
                answer = await device.predict(data.x, confidence=2.0)
                assert not answer.by_hub.any()
                # a second round if the error has ended the session in the first one
                assert (await device.train()).reason == "the job is finished"
                assert len(hub.run.records) == 1

    asyncio.run(asyncio.wait_for(job(), 30))


REQUESTS = {
    "refused": (TrunkRefused("the activations are not finite"), "not_finite", "are not finite"),
    "a failure": (TrunkFailed("the trunk's process has ended"), "internal", "try later"),
}
"""What the trunk raises at a request, and the code and text of the error that a device gets."""


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("request_of", ["a question", "features"])
def test_a_device_is_told_whether_the_same_request_may_succeed_later(
    what: str,
    request_of: str,
    tmp_path: Path,
    bundles: BundleIndex,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised, code, text = REQUESTS[what]
    config = hub_config(tmp_path, bundles, rounds=RoundRules(count=2))
    token = TokenFile(config.tokens).issue("phone")

    async def fail(request: object) -> None:
        raise raised

    async def job() -> None:
        async with running_hub(config) as (hub, url), raw(url) as connection:
            client = RawClient(connection)
            if request_of == "features":
                object.__setattr__(hub.method, "stage", always(ActivationMode.U_SHAPED))
            monkeypatch.setattr(hub.trunk, "answer", fail)
            monkeypatch.setattr(hub.trunk, "features", fail)
            task = await client.join(token)
            good = good_activations(bundles.manifest("small"), task.round)
            if request_of == "features":
                await client.say(replace(good, labels=None))
            else:
                await client.say(Infer(request=1, parts=good.parts))
            error = await client.hear(Error)
            assert (error.code, error.fatal) == (code, True)
            assert text in error.message
            assert HubError(error.code, error.message).is_temporary == (what == "a failure")
            assert await client.closed()

    asyncio.run(asyncio.wait_for(job(), 30))


def test_a_question_that_is_not_finite_is_refused_for_good(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
    token = TokenFile(config.tokens).issue("phone")

    async def job() -> None:
        async with running_hub(config) as (_, url), raw(url) as connection:
            client = RawClient(connection)
            await client.say(replace(GOOD, token=token))
            await client.hear(Welcome)
            parts = good_activations(bundles.manifest("small"), 1).parts
            parts["h.scale"] = np.full_like(parts["h.scale"], np.nan)
            await client.say(Infer(request=1, parts=parts))
            error = await client.hear(Error)
            assert (error.code, error.fatal) == ("not_finite", True)
            assert error.message == "the activations are not finite"
            assert await client.closed()

    asyncio.run(asyncio.wait_for(job(), 30))


def test_questions_whose_answers_are_not_acknowledged_end_one_session(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    manifest = bundles.manifest("small")
    config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1, min_devices=2))
    tokens = TokenFile(config.tokens)
    greedy, *honest = (tokens.issue(name) for name in ("greedy", "one", "two"))
    parts = good_activations(manifest, 1).parts

    async def job() -> None:
        async with running_hub(config) as (hub, url), AsyncExitStack() as stack:
            connection = await stack.enter_async_context(raw(url))
            client = RawClient(connection)
            await client.say(replace(GOOD, token=greedy))
            await client.hear(Welcome)
            for request in range(1, 18):
                await client.say(Infer(request=request, parts=parts))
            await client.say(Ready(samples=8))
            await hub.wait_until(lambda: "greedy" not in hub.gateway.peers)
            connection.transport.abort()  # it has not read the answers
            others = [RawClient(await stack.enter_async_context(raw(url))) for _ in honest]
            tasks = await asyncio.gather(
                *(c.join(token) for c, token in zip(others, honest, strict=True))
            )
            for other, task in zip(others, tasks, strict=True):
                await other.say(good_update(manifest, task.round))
            await others[0].hear(Stop)

    asyncio.run(asyncio.wait_for(job(), 30))
