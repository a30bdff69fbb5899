"""A hub that is full, and a hub that is asked to end: devices come in later."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from tests.lib.harness import (
    cutlayer,
    examples,
    finish,
    hub_config,
    next_event,
    running_hub,
    take_part,
)
from tests.lib.hub_files import write_hub_toml


def test_devices_get_into_a_full_hub_when_there_is_room(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """One of three may be in; the others try again, and all finish the job."""

    async def job() -> None:
        config = hub_config(
            tmp_path,
            bundles,
            rounds=RoundRules(count=1),
            keep_serving=True,  # after its only round too
            limits=Limits(connections=1, session_s=5.0, hello_s=2.0),
        )
        tokens = TokenFile(config.tokens)
        async with running_hub(config) as (hub, url):
            first = await Device.connect(
                url, token=tokens.issue("first"), tier="small", cache=tmp_path / "cache"
            )
            others = [
                asyncio.create_task(take_part(url, tokens.issue(name), tmp_path / "cache"))
                for name in ("second", "third")
            ]
            async with asyncio.timeout(20):
                while sum("no connections left" in line for line in caplog.messages) < 4:
                    await asyncio.sleep(0.02)
            assert list(hub.gateway.peers) == ["first"]
            answer = await first.predict(examples(4).x, confidence=1.1)
            assert answer.by_hub.all()  # who is in notices nothing
            await first.close()
            async with asyncio.timeout(60):
                await asyncio.gather(*others)

    asyncio.run(job())


def test_a_hub_that_is_asked_to_end_tells_its_devices(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """It closes within 10 s and says what is done; its device finishes the job of the next hub."""
    token = TokenFile(tmp_path / "tokens.toml").issue("phone")
    toml = write_hub_toml(tmp_path, bundles, rounds=1000, devices=1)
    hub = cutlayer("hub", "--config", str(toml), "--json")
    url = next_event(hub, "ready")["address"]

    async def job() -> tuple[int, str, str]:
        device = await Device.connect(
            url, token=token, tier="small", data=examples(24), cache=tmp_path / "cache"
        )
        async with device:
            training = asyncio.create_task(device.train())
            await asyncio.to_thread(next_event, hub, "round")
            asked = time.monotonic()
            hub.send_signal(signal.SIGTERM)
            ended = await asyncio.to_thread(finish, hub)
            assert time.monotonic() - asked < 10
            assert not training.done()
            listen = Listen(port=int(url.rpartition(":")[2]))
            rounds = RoundRules(count=1)
            config = hub_config(
                tmp_path, bundles, listen=listen, rounds=rounds, run=tmp_path / "next"
            )
            async with running_hub(config), asyncio.timeout(60):
                assert (await training).reason == "the job is finished"
        return ended

    code, out, err = asyncio.run(job())
    assert code == 128 + signal.SIGTERM
    assert '"event": "done"' in out
    assert "Traceback" not in err
    assert "dropped phone (tier small): the hub ends" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("cutlayer: ended by SIGTERM after ")
    assert last.endswith(" of 1000 rounds")
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "metrics.jsonl", "model.safetensors", "report.md", "curves.png",
    }  # fmt: skip


@pytest.mark.slow
def test_a_hub_that_only_serves_is_ended_in_good_order(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """After its last round a signal is how it is meant to end: exit code 0."""
    token = TokenFile(tmp_path / "tokens.toml").issue("phone")
    toml = write_hub_toml(tmp_path, bundles, rounds=1, devices=1)
    hub = cutlayer("hub", "--config", str(toml), "--json", "--keep-serving")
    url = next_event(hub, "ready")["address"]
    asyncio.run(take_part(url, token, tmp_path / "cache"))
    hub.send_signal(signal.SIGINT)
    code, _, err = finish(hub)
    assert code == 0, err
    assert "cutlayer:" not in err


def test_predictions_go_on_alone_after_the_hub_has_sent_a_device_away(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """A fatal error ends the connection; the device answers at once, and says why once."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("phone")
        x = examples(5).x
        async with running_hub(config) as (_, url):

            async def connect() -> Device:
                return await Device.connect(url, token=token, tier="small", cache=tmp_path / "c")

            device = await connect()
            own = await device.predict(x, confidence=0.0)
            async with await connect():  # a device with the same token takes its place
                asked = time.monotonic()
                answers = [await device.predict(x, confidence=1.1, timeout_s=30) for _ in range(3)]
                assert time.monotonic() - asked < 10
            for answer in answers:
                assert not answer.by_hub.any()
                assert (answer.probabilities == own.probabilities).all()
            await device.close()
        said = [line for line in caplog.messages if "answers alone" in line]
        assert len(said) == 1
        assert "another connection came with phone's token" in said[0]

    asyncio.run(job())
