"""Hub and devices as real processes over a real WebSocket, and the promises of the SDK."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk import DataError, Device, HubError, LinkClosed
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.bundle.store import sha256
from edge_sdk.inference.metrics import softmax
from edge_sdk.protocol.frames import decode
from edge_sdk.protocol.message import EXTENSIONS
from edge_sdk.protocol.messages import BlobGet, Error
from edge_sdk.runtime import Runtime, load_runtime
from edge_sdk.transport.link import open_websocket
from export.packing.codecs import get_codec
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.plan import ModelOffer
from server_hub.methods.settings import LocalTraining, MethodConfig
from server_hub.rounds.rounds import RoundRules
from tests.lib.harness import (
    cutlayer,
    examples,
    finish,
    hub_config,
    next_event,
    running_hub,
    save_npz,
)
from tests.lib.hub_files import write_hub_toml
from tests.lib.models import build
from tests.lib.proxy import proxy


def test_processes_train_one_model_over_websockets(tmp_path: Path, bundles: BundleIndex) -> None:
    """In a job of three tiers and six devices, all devices learn, and none imports torch."""
    tokens = TokenFile(tmp_path / "tokens.toml")
    names = [f"{tier}-{i}" for tier in bundles.tiers for i in (1, 2)]
    secrets = {name: tokens.issue(name, name.split("-")[0]) for name in names}
    config = write_hub_toml(tmp_path, bundles, rounds=4, devices=len(names))
    hub = cutlayer("hub", "--config", str(config), "--json")
    address = next_event(hub, "ready")["address"]
    devices = [
        cutlayer(
            "device", "--url", address,
            "--data", str(save_npz(tmp_path / f"{name}.npz", examples(60, seed=i))),
            "--evaluate", str(tmp_path / "held_out.npz"),
            "--cache", str(tmp_path / "cache" / name), "--json",
            CUTLAYER_TOKEN=secrets[name],
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    results = []
    for device in devices:
        code, out, err = finish(device)
        assert code == 0, err
        results.append(json.loads(out))
    code, out, err = finish(hub)
    assert code == 0, err
    rounds = [json.loads(line) for line in out.splitlines() if '"round"' in line]
    rounds = [event for event in rounds if event["event"] == "round"]
    assert [event["round"] for event in rounds] == [1, 2, 3, 4]
    assert all(event["devices"] == 6 and not event["dropped"] for event in rounds)
    assert rounds[-1]["local_loss"] < rounds[0]["local_loss"]
    assert rounds[-1]["trunk_loss"] < rounds[0]["trunk_loss"]
    for result in results:
        assert result["torch_imported"] is False
        assert len(result["rounds"]) == 4
        # accuracy that devices measure over the wire equals the hub's for their tier
        measured = rounds[-1]["accuracy"][result["tier"]]
        for path in ("device_alone", "through_hub", "ensemble"):
            assert result["evaluation"][path] == pytest.approx(measured[path], abs=0.031)
    traffic = rounds[-1]["bytes"]
    assert traffic["activations"]["up"] > 0
    assert traffic["update"]["up"] > 0
    assert traffic["blob"]["down"] > 0
    assert (tmp_path / "run" / "report.md").read_text().startswith("# FedSplitX")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


def test_a_killed_device_does_not_stall_the_others(tmp_path: Path, bundles: BundleIndex) -> None:
    """After kill -9 in the middle of a job, the session expires and the rounds go on."""
    tokens = TokenFile(tmp_path / "tokens.toml")
    secrets = {name: tokens.issue(name) for name in ("victim", "survivor")}
    config = write_hub_toml(tmp_path, bundles, rounds=6, devices=2, session_s=1.0)
    text = config.read_text().replace("min_devices = 2", "min_devices = 1")
    config.write_text(text)
    hub = cutlayer("hub", "--config", str(config), "--json")
    address = next_event(hub, "ready")["address"]
    devices = {}
    for name, rows in (("victim", 4000), ("survivor", 60)):
        data = save_npz(tmp_path / f"{name}.npz", examples(rows))
        devices[name] = cutlayer(
            "device", "--url", address, "--tier", "small", "--data", str(data),
            "--cache", str(tmp_path / "cache"), "--json", CUTLAYER_TOKEN=secrets[name],
        )  # fmt: skip
        time.sleep(0.5)
    next_event(hub, "round")
    devices["victim"].send_signal(signal.SIGKILL)
    code, out, err = finish(devices["survivor"])
    assert code == 0, err
    assert json.loads(out)["stopped"] == "the job is finished"
    assert finish(hub)[0] == 0
    finish(devices["victim"])


def test_sdk_trains_and_predicts(tmp_path: Path, bundles: BundleIndex) -> None:
    """Device.connect, train, predict: its own heads if they are confident, otherwise the hub."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=3))
        token = TokenFile(config.tokens).issue("phone")
        data, x = examples(80), examples(20, seed=3).x
        async with running_hub(config) as (hub, url):
            async with await Device.connect(
                url, token=token, tier="medium", data=data, cache=tmp_path / "cache"
            ) as device:
                seen: list[int] = []
                report = await device.train(lambda r: seen.append(r.round))
                assert report.reason == "the job is finished"
                assert seen == [1, 2, 3]
                own = await device.predict(x, confidence=0.0)
                assert not own.by_hub.any()
                every = await device.predict(x, confidence=1.1)
                assert every.by_hub.all()
                some = await device.predict(
                    x, confidence=float(np.median(own.probabilities.max(1)))
                )
                assert some.by_hub.any()
                assert not some.by_hub.all()
                confident = ~some.by_hub
                assert np.array_equal(some.probabilities[confident], own.probabilities[confident])
                evaluation = await device.evaluate(examples(50, seed=4))
            # PyTorch gives the same answers with the saved model
            model = build()
            model.load(tmp_path / "run" / "model.safetensors")
            entry = hub.index.tiers["medium"]
            codec = get_codec(entry.codec)
            with torch.no_grad():
                h = model.segment(torch.from_numpy(x), 1)
                logits = [model.aux["1"](h)]
                h = model.block[1](h)
                logits.append(model.aux["2"](h))
                h = codec.unpack(codec.pack(h, 1))
                h = model.block[2](h)
                logits += [model.aux["3"](h), model.head(model.block[3](h))]
            stacked = torch.stack(logits).numpy()
            assert softmax(stacked[:2]).mean(0) == pytest.approx(own.probabilities, abs=1e-4)
            assert softmax(stacked).mean(0) == pytest.approx(every.probabilities, abs=2e-3)
            assert evaluation.samples == 50

    asyncio.run(job())


def test_prediction_survives_a_hub_that_is_gone(tmp_path: Path, bundles: BundleIndex) -> None:
    """Without the hub, the device gives its own answer."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url):
            device = await Device.connect(
                url, token=token, tier="small", cache=tmp_path / "c", patience_s=1.0
            )
        answer = await device.predict(examples(5).x, confidence=1.1, timeout_s=0.5)
        assert not answer.by_hub.any()
        await device.close()

    asyncio.run(job())


def test_paper_form_runs(tmp_path: Path, bundles: BundleIndex) -> None:
    """It has two stores, a trunk replica per device, and activations from before training."""

    async def job() -> None:
        config = hub_config(
            tmp_path,
            bundles,
            method=MethodConfig(form="paper"),
            rounds=RoundRules(count=2, min_devices=2),
            local=LocalTraining(epochs=2, batch_size=8, hyper={"lr": 0.05}),
        )
        tokens = TokenFile(config.tokens)
        async with running_hub(config) as (hub, url):

            async def one(name: str, tier: str) -> None:
                async with await Device.connect(
                    url, token=tokens.issue(name), tier=tier,
                    data=examples(40), cache=tmp_path / "cache",
                ) as device:  # fmt: skip
                    await device.train()

            await asyncio.gather(one("a", "small"), one("b", "large"))
            record = hub.run.records[-1]
            assert record.devices == 2
            assert record.trunk_loss is not None
        for tier in bundles.tiers:
            model = build()
            model.load(tmp_path / "run" / f"model.{tier}.safetensors")

    asyncio.run(job())


def test_device_declines(tmp_path: Path, bundles: BundleIndex) -> None:
    """A device that may not train now does not delay the others."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=2, min_devices=2))
        tokens = TokenFile(config.tokens)
        async with running_hub(config) as (hub, url):

            async def one(name: str, reason: str | None) -> int:
                async with await Device.connect(
                    url, token=tokens.issue(name), tier="small", data=examples(24),
                    cache=tmp_path / "cache", may_train=lambda number: reason,
                ) as device:  # fmt: skip
                    return len((await device.train()).rounds)

            trained = await asyncio.gather(one("willing", None), one("tired", "battery at 5 %"))
            assert trained == [2, 0]
            assert "battery at 5 %" in hub.run.records[0].dropped["tired"]

    asyncio.run(job())


class FlakyProxy:
    """Forwards TCP connections, and cuts each one after a number of bytes from the device."""

    def __init__(self, port: int, seed: int, budget: int) -> None:
        self._port, self._rng, self._budget = port, np.random.default_rng(seed), budget
        self.cuts = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
        left = int(self._rng.integers(self._budget // 4, self._budget))

        async def forward(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
            nonlocal left
            while (data := await source.read(4096)) and left > 0:
                left -= len(data)
                to.write(data)
                await to.drain()

        tasks = [
            asyncio.create_task(forward(reader, upstream_writer)),
            asyncio.create_task(forward(upstream_reader, writer)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        self.cuts += left <= 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (writer, upstream_writer):
            end.transport.abort()


@pytest.mark.parametrize("seed", range(2))
def test_job_survives_a_link_that_breaks(tmp_path: Path, bundles: BundleIndex, seed: int) -> None:
    """Connections break in downloads, activations and updates, and no data are lost."""

    async def job() -> None:
        limits = Limits(session_s=20, blob_piece=8192, window=8)
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=3), limits=limits)
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (hub, url):
            flaky = FlakyProxy(int(url.rsplit(":", 1)[1]), seed, budget=120_000)
            proxy = await asyncio.start_server(flaky, "127.0.0.1", 0)
            through = f"ws://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
            async with await Device.connect(
                through, token=token, tier="large", data=examples(100),
                cache=tmp_path / "cache",
            ) as device:  # fmt: skip
                report = await device.train()
            proxy.close()
            assert [r.round for r in report.rounds] == [1, 2, 3]
            assert flaky.cuts >= 3
            for record in hub.run.records:
                assert record.devices == 1
                assert record.trunk_loss is not None
            # exactly once: each example passes the trunk's head once per round
            assert hub.method.aggregation.store.entries["head"].version == 3  # type: ignore[attr-defined]

    asyncio.run(asyncio.wait_for(job(), 100))


def test_devices_rejoin_a_hub_that_was_restarted(tmp_path: Path, bundles: BundleIndex) -> None:
    """A new hub at the same address does not know the session, so the device starts a new one."""

    async def job() -> None:
        first = hub_config(tmp_path, bundles, rounds=RoundRules(count=1000))
        token = TokenFile(first.tokens).issue("phone")
        async with running_hub(first) as (hub, url):
            device = await Device.connect(
                url, token=token, tier="small", data=examples(200),
                cache=tmp_path / "cache",
            )  # fmt: skip
            training = asyncio.create_task(device.train())
            while len(hub.run.records) < 2:
                await asyncio.sleep(0.02)
        again = replace(
            first,
            run=tmp_path / "second",
            rounds=RoundRules(count=2),
            listen=Listen(port=int(url.rsplit(":", 1)[1])),
        )
        async with running_hub(again) as (hub, _):
            report = await asyncio.wait_for(training, 30)
            assert report.reason == "the job is finished"
            assert [record.devices for record in hub.run.records] == [1, 1]
            await device.close()

    asyncio.run(job())


def test_a_slow_hub_slows_the_device_down(tmp_path: Path, bundles: BundleIndex) -> None:
    """While the trunk is blocked, training stops at the window; afterwards nothing is lost."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1), limits=Limits(window=4))
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (hub, url):
            go = asyncio.Event()
            step, rows = hub.trunk.step, []

            async def stuck(arrivals: Any) -> Any:
                await go.wait()
                rows.extend(arrival.rows for arrival in arrivals)
                return await step(arrivals)

            hub.trunk.step = stuck  # type: ignore[method-assign]
            steps = 0

            def load(bundle: Bundle, threads: int) -> Runtime:
                runtime = load_runtime(bundle, threads)
                run = runtime.run

                def counted(graph: str, batch: Any) -> Any:
                    nonlocal steps
                    steps += graph == "train"
                    return run(graph, batch)

                runtime.run = counted  # type: ignore[method-assign]
                return runtime

            device = Device(
                lambda: open_websocket(url), load, token=token, tier="small", data=examples(320),
                cache=tmp_path / "cache",
            )  # fmt: skip
            await device.join()
            training = asyncio.create_task(device.train())
            await asyncio.sleep(1.5)
            # ready is settled; four batches are unsettled, the fifth waits for room
            assert steps == 5
            go.set()
            await training
            assert steps == 320 // 8
            assert sum(rows) == 320
            await device.close()

    asyncio.run(job())


def test_a_device_that_only_predicts_has_the_present_state(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """It gets the trained state, not the exported one, even if rounds end quickly."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, keep_serving=True)
        tokens = TokenFile(config.tokens)
        held_out = examples(64, seed=7)
        async with running_hub(config) as (hub, url):

            async def join(name: str, address: str = url, **more: Any) -> Device:
                return await Device.connect(
                    address, token=tokens.issue(name), tier="large",
                    cache=tmp_path / "cache", **more,
                )  # fmt: skip

            before = await join("early")
            first = await before.evaluate(held_out)
            async with await join("trainer", data=examples(200)) as trainer:
                await trainer.train()
                own = await trainer.evaluate(held_out)
            asked: list[str] = []

            def forget_once(frame: bytes) -> bytes:
                message = decode(frame, agreed=EXTENSIONS).message
                if isinstance(message, BlobGet):
                    asked.append(message.hash)
                    if len(asked) == 1:  # two rounds end before the hub receives the request
                        for number in range(2):
                            state = bytes([number])
                            offer = ModelOffer(state=sha256(state))
                            offers = dict.fromkeys(bundles.tiers, offer)
                            hub.gateway.blobs.publish(offers, {sha256(state): state})
                return frame

            def republish(frame: bytes) -> bytes:
                message = decode(frame, agreed=EXTENSIONS).message
                if isinstance(message, Error) and message.code == "unknown_blob":
                    published.append(asyncio.ensure_future(hub.publisher.publish()))
                return frame

            published: list[asyncio.Future[None]] = []
            async with (
                proxy(url, forget_once, republish) as between,
                await join("late", between) as late,
            ):
                assert await late.evaluate(held_out) == own
            assert len(asked) > 1
            assert len(published) == 1
            assert own != first
            await before.close()

    asyncio.run(job())


def test_wrong_data_is_refused_before_training(tmp_path: Path, bundles: BundleIndex) -> None:
    """Invalid labels, shapes and values raise an error of the caller at connect."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("phone")
        good = examples(10)
        wrong = {
            "the model has the classes": replace(good, y=good.y + 5),
            "x has shape": replace(good, x=good.x[:, :, :4]),
            "must be finite": replace(good, x=np.full_like(good.x, np.nan)),
            "integer labels": replace(good, y=good.y.astype(np.float32)),
            "x has shape [0": replace(good, x=good.x[:0], y=good.y[:0]),
        }
        async with running_hub(config) as (_, url):
            for message, data in wrong.items():
                with pytest.raises(DataError) as caught:
                    await Device.connect(
                        url, token=token, tier="small", data=data,
                        cache=tmp_path / "cache",
                    )  # fmt: skip
                assert message in str(caught.value)

    asyncio.run(job())


def test_connect_errors(tmp_path: Path, bundles: BundleIndex) -> None:
    """A wrong token, an unknown tier and a missing hub each have their own error."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url):
            with pytest.raises(HubError, match="token") as caught:
                await Device.connect(url, token="x", tier="small", cache=tmp_path)
            assert (caught.value.code, caught.value.field) == ("bad_token", "token")
            with pytest.raises(HubError, match="large, medium, small") as caught:
                await Device.connect(url, token=token, tier="huge", cache=tmp_path)
            assert (caught.value.code, caught.value.field) == ("unknown_tier", "tier")
        with pytest.raises(LinkClosed, match="cannot connect"):
            await Device.connect(url, token=token, tier="small", cache=tmp_path, patience_s=0.3)

    asyncio.run(job())
