"""Moves of cuts between a hub and devices over WebSockets, in the middle of a job."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import BundleError, ConfigError, HubError, LinkClosed
from edge_sdk.protocol.channel import Channel
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.message import EXTENSIONS
from edge_sdk.protocol.messages import (
    VERSION,
    Ack,
    Activations,
    Gradient,
    Message,
    Move,
    Ready,
    Round,
    Stop,
    Welcome,
)
from edge_sdk.runtime import Runtime
from edge_sdk.training.data import Examples
from edge_sdk.transport.connection import Connection, Question
from edge_sdk.transport.link import Link, MemoryLink, open_websocket
from edge_sdk.transport.replies import RoundOver
from export.bundles.writer import Tier, export_bundles, make_steps, segment_of
from export.cutting.split_model import WEIGHTS, SplitModel
from export.packing import codecs as packing
from export.steps.client_steps import ClientSteps
from export.steps.torch_runtime import TorchRuntime
from server_hub.config import HubConfig
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.methods.settings import LocalTraining, MethodConfig
from server_hub.rounds import cut_moves
from server_hub.rounds.cut_policy import Cuts, Seen, Target
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.local import LocalTrunk
from server_hub.trunk.settings import TrunkTraining
from tests.lib.codecs import Exact
from tests.lib.harness import cutlayer, finish, next_event, save_npz, served
from tests.lib.harness import examples as images
from tests.lib.models import CLASSES, FEATURES, MeanHead, TokenBlock
from tests.lib.proxy import proxy
from tests.lib.tasks import run

HYPER = {"lr": 0.05, "momentum": 0.9}
HASH = "0" * 64

T = TypeVar("T")


def build() -> SplitModel:
    """Return four blocks for vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [TokenBlock(8) for _ in range(4)]
        return SplitModel(nn.Linear(FEATURES[0], 8), blocks, MeanHead(8, CLASSES))


@dataclass(frozen=True)
class Export:
    """Bundles with graphs for returned gradients, and the steps of these graphs."""

    index: BundleIndex
    steps: Mapping[str, ClientSteps]

    def load(self, bundle: Bundle, threads: int) -> Runtime:
        """Return a runtime for a bundle."""
        return TorchRuntime(bundle.manifest, self.steps[bundle.manifest.tier])


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """Three tiers that pack activations without loss, and one that does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing.CODECS, "float32", Exact())
        exact = Tier(1, "float32", "torch", graphs=["backward"])
        tiers = {
            "one": exact,
            "two": replace(exact, cut=2),
            "three": replace(exact, cut=3),
            "half": replace(exact, cut=2, codec="fp16"),
        }
        model, example = build(), torch.randn(4, *FEATURES)
        folder = tmp_path_factory.mktemp("moves") / "bundles"
        index = export_bundles(
            model, tiers, folder, example=example, classes=CLASSES, verified=False
        )
        steps = {
            name: make_steps(segment_of(model, tier), tier, example, CLASSES, "sgd")
            for name, tier in tiers.items()
        }
        yield Export(index, steps)


def some(count: int, seed: int = 0) -> Examples:
    """Return examples that can be learned."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    x = np.random.default_rng(99).standard_normal((CLASSES, *FEATURES))[y]
    return Examples((x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), y)


class Script:
    """A policy with a given target after each round, if the target is among the options."""

    def __init__(self, *rounds: dict[str, int]) -> None:
        self.rounds = list(rounds)
        self.seen: list[dict[str, Seen]] = []

    def state(self) -> dict[str, Any]:
        """Return no state."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Ignore the state."""

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        """Return the cuts of the script."""
        self.seen.append(dict(fleet))
        wanted = self.rounds[len(self.seen) - 1] if len(self.seen) <= len(self.rounds) else {}
        return {
            device: Target(cut, "the script says so")
            for device, cut in wanted.items()
            if device in fleet and cut in fleet[device].options
        }


def config_of(folder: Path, export: Export, count: int, **changes: Any) -> HubConfig:
    """Return a configuration with exact steps: no mixing, no clipping, no schedule."""
    config = HubConfig(
        bundles=export.index.folder,
        tokens=folder / "tokens.toml",
        run=folder / "run",
        schedule="constant",
        listen=Listen(port=0),
        method=MethodConfig("splitft"),
        rounds=RoundRules(count),
        local=LocalTraining(1, 8, HYPER),
        trunk=TrunkTraining("cpu", hyper=HYPER, wait_s=0.0, max_norm=math.inf),
        cuts=Cuts(wait_s=20),
        limits=Limits(session_s=5, hello_s=2),
    )
    return replace(config, **changes)


@asynccontextmanager
async def running(config: HubConfig, script: Script) -> AsyncIterator[tuple[Hub, str]]:
    """Run a hub in this process with the script as its policy; yield it with its address."""
    if not config.tokens.exists():
        TokenFile(config.tokens).issue("nobody")
    model = build()
    model.load(config.bundles / WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_moves, "policy_of", lambda name: script)
        hub = Hub(config, model, LocalTrunk(model, "cpu"))
    async with served(hub) as url:
        yield hub, url


@dataclass
class Fleet:
    """Makes devices for a hub."""

    export: Export
    hub: Hub
    url: str
    folder: Path

    async def join(self, name: str, tier: str | None = None, **more: Any) -> Device:
        """Return a connected device; its token is for the tier of ``issued``, if that is given."""
        token = TokenFile(self.hub.config.tokens).issue(name, more.pop("issued", None))
        settings: dict[str, Any] = {
            "data": some(32),
            "load": self.export.load,
            "patience_s": 5.0,
        } | more
        device = Device(
            lambda: open_websocket(self.url), token=token, tier=tier,
            cache=self.folder / "cache" / name, **settings,
        )  # fmt: skip
        await device.join()
        return device

    def tier_of(self, name: str) -> str:
        """Return the tier of a device according to the hub."""
        return self.hub.gateway.peers[name].tier


@asynccontextmanager
async def fleet(
    folder: Path, export: Export, script: Script, count: int, **changes: Any
) -> AsyncIterator[Fleet]:
    """Run a hub; yield it with a factory of devices."""
    async with running(config_of(folder, export, count, **changes), script) as (hub, url):
        yield Fleet(export, hub, url, folder)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():
        await asyncio.sleep(0.002)


def cuts_of(hub: Hub, name: str) -> list[int | None]:
    """Return a device's cut in every round."""
    return [record.cuts.get(name) for record in hub.run.records]


# --- a job whose device moves ---------------------------------------------------------------------


async def one_job(
    folder: Path,
    export: Export,
    script: Script,
    disturb: Callable[[Fleet], None] = lambda made: None,
) -> tuple[Hub, list[int], Any]:
    """Run five rounds with one device; return hub, the device's own list of cuts, and model."""
    cuts: list[int] = []
    async with fleet(folder, export, script, 5) as made:
        async with await made.join("a", "two") as device:
            disturb(made)
            report = await device.train(lambda done: cuts.append(device.manifest.cut))
            assert [done.round for done in report.rounds] == [1, 2, 3, 4, 5]
            assert made.tier_of("a") == device.manifest.tier
        hub = made.hub
    return hub, cuts, load_file(folder / "run" / "model.safetensors")


def test_a_device_goes_deeper_and_shallower_and_no_step_is_lost(
    tmp_path: Path, export: Export, caplog: pytest.LogCaptureFixture
) -> None:
    """The model after the job is that of a device that does not move."""
    caplog.set_level(logging.DEBUG, "cutlayer.hub")
    hub, own, stayed = run(one_job(tmp_path / "stays", export, Script()), 30)
    assert cuts_of(hub, "a") == own == [2, 2, 2, 2, 2]
    script = Script({"a": 3}, {"a": 1}, {}, {"a": 2})
    hub, own, moved = run(one_job(tmp_path / "moves", export, script), 30)
    assert cuts_of(hub, "a") == own == [2, 3, 1, 1, 2]
    assert [record.moves for record in hub.run.records] == [
        [{"device": "a", "cut": cut, "to": to, "reason": "the script says so"}] if to else []
        for cut, to in ((2, 3), (3, 1), (1, None), (1, 2), (2, None))
    ]
    lines = (tmp_path / "moves" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["cuts"]["a"] for line in lines] == own
    said = [record.getMessage() for record in caplog.records if "goes from" in record.getMessage()]
    assert said == [
        f"a goes from cut {cut} to {to}: the script says so" for cut, to in ((2, 3), (3, 1), (1, 2))
    ]
    assert [seen["a"].cut for seen in script.seen] == [2, 3, 1, 1]  # not asked after the last
    assert all(seen["a"].compute_s and seen["a"].loss for seen in script.seen)
    start = {name: t.detach().numpy() for name, t in build().tensors().items()}
    for name in stayed:
        np.testing.assert_allclose(moved[name], stayed[name], rtol=1e-4, atol=1e-6, err_msg=name)
        if name in start:
            assert np.abs(stayed[name] - start[name]).max() > 1e-3, name


def test_a_gradient_for_a_round_that_is_over_is_not_applied(tmp_path: Path, export: Export) -> None:
    """Huge gradients for the previous round arrive in every round and do not change the model."""

    def disturb(made: Fleet) -> None:
        hub, start = made.hub, made.hub.rounds.start

        def start_and_send(now: float, everyone: bool) -> Any:
            members = start(now, everyone)
            number = hub.rounds.number
            wrong = {"h": np.full((8, 8), 1e6, np.float32)}
            loop = asyncio.get_running_loop()
            for batch in range(4) if number > 1 else ():
                late = Gradient(number - 1, batch, wrong)
                loop.call_soon(hub.gateway.post, hub.gateway.peers["a"], late)  # after the round
            return members

        hub.rounds.start = start_and_send  # type: ignore[method-assign]

    _, _, want = run(one_job(tmp_path / "quiet", export, Script()), 30)
    _, _, got = run(one_job(tmp_path / "disturbed", export, Script(), disturb), 30)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_devices_move_while_others_stay(tmp_path: Path, export: Export) -> None:
    """Two devices exchange their cuts, and a device with another codec gets no options."""
    script = Script({"a": 3, "b": 1}, {"a": 1, "b": 3})

    async def job() -> None:
        rules = RoundRules(4, min_devices=3)
        async with fleet(tmp_path, export, script, 4, rounds=rules) as made:

            async def live(name: str, tier: str, seed: int) -> None:
                async with await made.join(name, tier, data=some(16, seed)) as device:
                    await device.train()
                    assert made.tier_of(name) == device.manifest.tier

            await asyncio.gather(live("a", "one", 1), live("b", "three", 2), live("c", "half", 3))
            assert [record.cuts for record in made.hub.run.records] == [
                {"a": 1, "b": 3, "c": 2},
                {"a": 3, "b": 1, "c": 2},
                {"a": 1, "b": 3, "c": 2},
                {"a": 1, "b": 3, "c": 2},
            ]
            assert all(record.devices == 3 for record in made.hub.run.records)
            for seen in script.seen:
                assert seen["a"].options == seen["b"].options == [1, 2, 3]
                assert seen["c"].options == [2]

    run(job(), 30)


# --- limits of a device ---------------------------------------------------------------------------


def test_a_tier_that_takes_more_memory_than_there_is_is_no_option(
    tmp_path: Path, export: Export
) -> None:
    """The device's own tier remains an option, because it is loaded already."""
    script = Script()
    memory = {"small": 40, "enough": 60, "large": 100, "silent": None}
    settings = Cuts(memory_mb={"two": 50.0, "three": 100.0})

    async def job() -> None:
        rules = RoundRules(2, min_devices=4)
        async with fleet(tmp_path, export, script, 2, cuts=settings, rounds=rules) as made:

            async def live(name: str) -> None:
                tier = "two" if name == "small" else "one"
                async with await made.join(name, tier, memory_mb=memory[name]) as device:
                    await device.train()

            await asyncio.gather(*map(live, memory))
        assert {device: seen.options for device, seen in script.seen[0].items()} == {
            "small": [1, 2], "enough": [1, 2], "large": [1, 2, 3], "silent": [1, 2, 3],
        }  # fmt: skip

    run(job(), 30)


def test_memory_of_a_tier_that_is_not_there_is_an_error(tmp_path: Path, export: Export) -> None:
    config = config_of(tmp_path, export, 1, cuts=Cuts(memory_mb={"tow": 50.0}))
    TokenFile(config.tokens).issue("nobody")
    with pytest.raises(ConfigError, match=r"\[cuts.memory_mb\] names the tier 'tow'; there are"):
        Hub(config, build(), LocalTrunk(build(), "cpu"))


@pytest.mark.parametrize("how", ["does not load", "damaged at the hub", "no room"])
def test_a_device_that_cannot_load_a_bundle_stays_where_it_is(
    tmp_path: Path, export: Export, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """It is not told to load that tier again, and may still move to another."""
    script = Script({"a": 3}, {"a": 3}, {"a": 1})
    folder = tmp_path / "bundles"
    shutil.copytree(export.index.folder, folder)
    copied = replace(export, index=BundleIndex.read(folder))

    def load(bundle: Bundle, threads: int) -> Runtime:
        if bundle.manifest.tier == "three":
            if how == "does not load":
                raise BundleError("this device has no such operator")
            raise OSError(28, "No space left on device")
        return export.load(bundle, threads)

    async def job() -> None:
        async with fleet(tmp_path, copied, script, 4) as made:
            if how == "damaged at the hub":  # after the hub has checked the blob
                blob = folder / "blobs" / made.hub.manifests["three"].initial_state
                blob.write_bytes(blob.read_bytes()[:-1])
            async with await made.join("a", "two", load=load) as device:
                report = await device.train()
                assert len(report.rounds) == 4
                assert made.tier_of("a") == device.manifest.tier == "one"
            assert cuts_of(made.hub, "a") == [2, 2, 2, 1]
            assert [[m["to"] for m in r.moves] for r in made.hub.run.records] == [[3], [], [1], []]

    run(job(), 30)
    assert [seen["a"].options for seen in script.seen] == [[1, 2, 3], [1, 2], [1, 2]]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings.count("a could not load the bundle of three and stays at two") == 1
    (own,) = (line for line in warnings if line.startswith("cannot move to three"))
    assert "the script says so" in own


# --- slow and leaving devices ---------------------------------------------------------------------


def test_a_device_that_never_gets_ready_is_waited_for_once(tmp_path: Path, export: Export) -> None:
    """The others wait ``wait_s`` for it once, then go on; the job's end finds it ready."""
    script = Script({"a": 3})
    go, loaded = threading.Event(), []

    async def job() -> None:
        settings = Cuts(wait_s=0.4)
        rules = RoundRules(5, min_devices=1)
        async with fleet(tmp_path, export, script, 5, cuts=settings, rounds=rules) as made:
            hub, waits = made.hub, []
            wait = hub.cut_moves.until_ready

            async def timed() -> None:
                started = asyncio.get_running_loop().time()
                await wait()
                waits.append(asyncio.get_running_loop().time() - started)

            hub.cut_moves.until_ready = timed  # type: ignore[method-assign]

            def load(bundle: Bundle, threads: int) -> Runtime:  # runs in its own thread
                if loaded:
                    go.wait(20)
                loaded.append(export.load(bundle, threads))
                return loaded[-1]

            slow = await made.join("a", "two", load=load)
            other = await made.join("b", "one")
            training = asyncio.create_task(slow.train())
            await until(lambda: "a" in hub.rounds.ready)
            report = await other.train()
            assert [done.round for done in report.rounds][-4:] == [2, 3, 4, 5]
            assert cuts_of(hub, "a") == [2, None, None, None, None]
            assert [seconds > 0.2 for seconds in waits] == [True, False, False, False]
            go.set()  # now the hub's stop must reach the device in its new tier
            assert (await training).reason == "the job is finished"
            assert made.tier_of("a") == slow.manifest.tier == "three"
            final = load_file(tmp_path / "run" / "model.safetensors")
            for name, tensor in loaded[-1].get_state().items():
                np.testing.assert_array_equal(tensor, final[name])
            await asyncio.gather(slow.close(), other.close())

    run(job(), 30)


def test_a_device_that_is_killed_in_a_move_is_waited_for_briefly(
    tmp_path: Path, export: Export
) -> None:
    """The others go on without it, though its session is kept and ``wait_s`` is long."""
    script = Script({"a": 3})
    go, loaded, links = threading.Event(), [], []

    async def job() -> None:
        changes = {"cuts": Cuts(wait_s=60.0), "limits": Limits(session_s=60.0), "leave_s": 0.1}
        rules = RoundRules(3, min_devices=1)
        async with fleet(tmp_path, export, script, 3, rounds=rules, **changes) as made:

            def load(bundle: Bundle, threads: int) -> Runtime:  # runs in its own thread
                loaded.append(bundle.manifest.tier)
                if len(loaded) > 1:
                    go.wait(20)
                return export.load(bundle, threads)

            async def open_link() -> Link:
                if len(loaded) > 1:
                    raise LinkClosed("the device was killed")
                links.append(await open_websocket(made.url))
                return links[-1]

            token = TokenFile(made.hub.config.tokens).issue("a")
            killed = Device(open_link, load, token=token, tier="two", data=some(32),
                            cache=tmp_path / "cache" / "a", patience_s=1.0)  # fmt: skip
            await killed.join()
            other = await made.join("b", "one")
            lost = asyncio.create_task(killed.train())
            await until(lambda: "a" in made.hub.rounds.ready)
            training = asyncio.create_task(other.train())
            await until(lambda: len(loaded) > 1)
            await links[-1].close()
            report = await asyncio.wait_for(training, 10)
            assert report.rounds[-1].round == 3
            assert cuts_of(made.hub, "a")[1:] == [None, None]
            go.set()
            with pytest.raises(LinkClosed):
                await lost
            await asyncio.gather(killed.close(), other.close())

    run(job(), 30)


@pytest.mark.parametrize("moved", [False, True])
def test_a_device_that_leaves_with_batches_in_flight_does_not_stop_the_job(
    tmp_path: Path, export: Export, moved: bool
) -> None:
    """It says bye while the trunk has its activations, before or after a move."""
    script = Script({"a": 3} if moved else {})
    last = 2 if moved else 1

    sent: Counter[int] = Counter()

    def count(frame: bytes) -> bytes:
        message = decode(frame, agreed=EXTENSIONS).message
        if isinstance(message, Activations):
            sent[message.round] += 1
        return frame

    async def job() -> None:
        rules = RoundRules(4, min_devices=1)
        local = LocalTraining(1, 4, HYPER, staleness=3)
        async with (
            fleet(tmp_path, export, script, 4, rounds=rules, local=local) as made,
            proxy(made.url, up=count) as url,
        ):
            hub, go = made.hub, asyncio.Event()
            step = hub.trunk.step

            async def stuck(arrivals: Any) -> Any:
                if hub.rounds.number == last:
                    await go.wait()
                return await step(arrivals)

            hub.trunk.step = stuck  # type: ignore[method-assign]
            leaver = await replace(made, url=url).join("a", "two")
            other = await made.join("b", "one")
            leaving = asyncio.create_task(leaver.train())
            await until(lambda: "a" in hub.rounds.ready)
            staying = asyncio.create_task(other.train())
            if not moved:  # device a was alone in the first round
                await until(lambda: "b" in hub.rounds.ready)
            await until(lambda: hub.rounds.number == last and sent[last] >= 4)  # staleness plus one
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            closing = asyncio.create_task(leaver.close())
            await until(lambda: "a" not in hub.gateway.peers)
            go.set()
            await closing
            report = await staying
            assert report.reason == "the job is finished"
            assert hub.rounds.completed == 4
            assert [r.cuts.get("a") for r in hub.run.records] == ([2] if moved else []) + [None] * (
                3 if moved else 4
            )
            await other.close()

    run(job(), 30)


def test_a_device_whose_round_is_over_stops_waiting_for_gradients(
    tmp_path: Path, export: Export
) -> None:
    """The hub continues without it in the middle of a round; it takes part in the next."""

    async def job() -> None:
        rules = RoundRules(3, min_devices=2)
        async with fleet(tmp_path, export, Script(), 3, rounds=rules) as made:
            hub = made.hub
            step = hub.trunk.step

            async def dropping(arrivals: Any) -> Any:
                report = await step(arrivals)
                if hub.rounds.number == 1 and any(a.device == "a" for a in arrivals):
                    hub.rounds.drop("a", "it is too slow")
                return report

            hub.trunk.step = dropping  # type: ignore[method-assign]

            async def live(name: str) -> list[int]:
                async with await made.join(name, "two") as device:
                    return [done.round for done in (await device.train()).rounds]

            assert [*await asyncio.gather(live("a"), live("b"))] == [[2, 3], [1, 2, 3]]
            assert hub.run.records[0].dropped == {"a": "it is too slow"}

    run(job(), 30)


# --- sessions that end ----------------------------------------------------------------------------


def test_a_device_comes_back_with_the_tier_that_it_was_moved_to(
    tmp_path: Path, export: Export
) -> None:
    """It starts a new session, although its token was issued for its first tier."""
    script = Script({"a": 3})

    async def job() -> None:
        async with fleet(tmp_path, export, script, 4) as made:
            hub = made.hub
            async with await made.join("a", issued="two") as device:
                assert device.manifest.tier == made.tier_of("a") == "two"
                training = asyncio.create_task(device.train())
                await until(lambda: len(hub.run.records) >= 2)
                before = hub.gateway.peers["a"]
                hub.gateway.drop(before, "for a test")
                await until(lambda: "a" in hub.gateway.peers)
                assert hub.gateway.peers["a"].session_id != before.session_id
                assert made.tier_of("a") == "three"
                assert (await training).reason == "the job is finished"
                assert device.manifest.tier == made.tier_of("a") == "three"
            assert cuts_of(hub, "a") == [2, 3, 3, 3]
            assert hub.run.records[-1].round == 4

    run(job(), 30)


@dataclass(frozen=True)
class Return:
    """A way to return after a move from ``two`` to ``three``, and the tier that results."""

    issued: str | None
    tier: str | None
    memory_mb: int | None
    gets: str


@pytest.mark.parametrize(
    "back",
    [
        Return("two", None, None, gets="three"),
        Return("two", None, 100, gets="three"),
        Return("two", None, 99, gets="two"),
        Return("two", "one", None, gets="one"),
        Return(None, None, None, gets="three"),
        Return("one", None, None, gets="three"),
        Return("half", None, None, gets="half"),  # a tier with another codec
    ],
    ids=str,
)
def test_a_device_that_starts_anew_goes_on_where_it_was_moved_to(
    tmp_path: Path, export: Export, back: Return
) -> None:
    """This holds unless it names a tier, or its memory or its token's tier forbids that one."""
    settings = Cuts(memory_mb={"three": 100.0})

    async def job() -> None:
        async with fleet(tmp_path, export, Script({"a": 3}), 6, cuts=settings) as made:
            hub = made.hub
            first = await made.join("a", issued="two", memory_mb=100)
            training = asyncio.create_task(first.train())
            await until(lambda: len(hub.run.records) >= 2)
            training.cancel()
            await asyncio.gather(training, return_exceptions=True)
            await first.close()
            await until(lambda: not hub.gateway.peers)
            rounds = len(hub.run.records)
            again = await made.join("a", back.tier, issued=back.issued, memory_mb=back.memory_mb)
            async with again:
                assert again.manifest.tier == made.tier_of("a") == back.gets
                assert (await again.train()).reason == "the job is finished"
                assert again.manifest.tier == back.gets
            cut = hub.manifests[back.gets].cut
            assert cuts_of(hub, "a") == [2] + [3] * (rounds - 1) + [cut] * (6 - rounds)

    run(job(), 30)


def test_a_session_goes_on_though_the_device_names_no_tier(tmp_path: Path, export: Export) -> None:
    """It was moved in an earlier process; after a break the session has the new tier."""

    async def job() -> None:
        async with fleet(tmp_path, export, Script(), 3) as made:
            hub = made.hub
            hub.cut_moves.restore({"tiers": {"a": "three"}, "policy": {}})
            async with await made.join("a", issued="two") as device:
                before = hub.gateway.peers["a"]
                assert before.tier == "three"
                await before.session.unlink()
                await until(lambda: not before.session.linked)
                await until(lambda: before.session.linked)
                assert hub.gateway.peers["a"] is before
                await device.train()
            assert cuts_of(hub, "a") == [3, 3, 3]

    run(job(), 30)


@pytest.mark.parametrize("lost", ["link", "session"])
def test_a_connection_that_ends_during_a_move_ends_neither_device_nor_job(
    tmp_path: Path, export: Export, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    """Both sides agree about the tier afterwards, whether it is the old or the new one."""
    script = Script({"a": 3}, {}, {"a": 1})

    async def job() -> None:
        async with fleet(tmp_path, export, script, 4) as made:
            hub = made.hub
            loop, loads = asyncio.get_running_loop(), []

            async def end_it() -> None:
                peer = hub.gateway.peers["a"]
                if lost == "link":
                    await peer.session.unlink()
                    return
                hub.gateway.drop(peer, "for a test")
                await until(lambda: hub.gateway.peers.get("a", peer) is not peer)

            def breaking(bundle: Bundle, threads: int) -> Runtime:  # runs in its own thread
                loads.append(bundle.manifest.tier)
                if len(loads) == 2:  # the load of the move; ready is sent after it
                    asyncio.run_coroutine_threadsafe(end_it(), loop).result()
                return export.load(bundle, threads)

            async with await made.join("a", issued="two", load=breaking) as device:
                report = await device.train()
                assert report.reason == "the job is finished"
                assert made.tier_of("a") == device.manifest.tier == "one"
            expected = 3 if lost == "link" else 2
            assert cuts_of(hub, "a") == [2, expected, expected, 1]

    run(job(), 30)
    assert not [r for r in caplog.records if "could not load" in r.getMessage()]


def test_a_device_that_came_back_after_a_move_was_planned_is_not_moved(
    tmp_path: Path, export: Export, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of the round its new session has not sent ready yet."""
    script = Script({"a": 3}, {}, {"a": 1})

    async def job() -> None:
        async with fleet(tmp_path, export, script, 4) as made:
            hub = made.hub
            publish = hub.publisher.publish

            async def back_meanwhile() -> None:
                await publish()
                if len(script.seen) == 1 and not hub.run.records:
                    before = hub.gateway.peers["a"]
                    hub.gateway.drop(before, "for a test")
                    while hub.gateway.peers.get("a", before) is before:
                        await asyncio.sleep(0)

            hub.publisher.publish = back_meanwhile  # type: ignore[method-assign]
            async with await made.join("a", "two") as device:
                assert (await device.train()).reason == "the job is finished"
                assert made.tier_of("a") == device.manifest.tier == "one"
            assert cuts_of(hub, "a") == [2, 2, 2, 1]

    run(job(), 30)
    assert not [r for r in caplog.records if "could not load" in r.getMessage()]


def test_a_device_loads_the_bundle_of_a_hub_that_has_another(
    tmp_path: Path, export: Export
) -> None:
    """Its token is issued for another tier while it is offline; the new session's bundle counts."""

    async def job() -> None:
        async with fleet(tmp_path, export, Script(), 4) as made:
            hub = made.hub
            async with await made.join("a", issued="two") as device:
                training = asyncio.create_task(device.train())
                await until(lambda: len(hub.run.records) >= 1)
                tokens = hub.config.tokens
                tokens.write_text(tokens.read_text().replace('"two"', '"three"'))
                hub.gateway.drop(hub.gateway.peers["a"], "for a test")
                assert (await training).reason == "the job is finished"
                assert device.manifest.tier == made.tier_of("a") == "three"

    run(job(), 30)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["three", "no such tier"])
def test_ready_with_a_tier_that_it_was_not_told_to_load_is_refused(
    tmp_path: Path, export: Export, tier: str
) -> None:
    async def job() -> None:
        async with fleet(tmp_path, export, Script(), 1) as made:
            token = TokenFile(made.hub.config.tokens).issue("a")
            connection = Connection(
                lambda: open_websocket(made.url), token=token, tier="two", patience_s=1.0
            )
            await connection.open()
            await connection.send(Ready(samples=4, tier=tier))
            with pytest.raises(HubError, match="it is of tier 'two'") as caught:
                await connection.next_work()
            assert (caught.value.code, caught.value.field) == ("unknown_tier", "tier")
            assert not made.hub.rounds.ready
            await connection.close("done")
            # the job goes on with the other devices
            async with await made.join("b", "one") as device:
                assert (await device.train()).reason == "the job is finished"

    run(job(), 30)


@pytest.mark.parametrize("says", [None, "two"])
def test_ready_with_the_tier_of_the_welcome_or_none_is_taken(
    tmp_path: Path, export: Export, says: str | None
) -> None:
    async def job() -> None:
        async with fleet(tmp_path, export, Script(), 1) as made:
            token = TokenFile(made.hub.config.tokens).issue("a")
            connection = Connection(
                lambda: open_websocket(made.url), token=token, tier="two", patience_s=1.0
            )
            await connection.open()
            await connection.send(Ready(samples=4, tier=says))
            _, delivery = await connection.next_work()
            assert isinstance(delivery.message, Round)
            await connection.close("done")

    run(job(), 30)


def test_an_answer_is_that_of_the_tier_which_has_packed_the_question(
    tmp_path: Path, export: Export
) -> None:
    """Activations that were packed before a move reach the hub after it."""
    x = some(5, seed=3).x

    async def job() -> None:
        async with fleet(tmp_path, export, Script({"a": 3}), 2) as made:
            async with await made.join("a", "two") as device:
                packed = Bundle.open(device.manifest, export.index.blobs().read)
                logits = export.load(packed, 1).run("predict", {"x": x})
                parts = {spec.name: logits[spec.name] for spec in device.manifest.packed}
                assert device.manifest.tier == "two"
                await device.train()
                assert device.manifest.tier == made.tier_of("a") == "three"
                token = TokenFile(made.hub.config.tokens).issue("asker")
                asker = Connection(
                    lambda: open_websocket(made.url), token=token, tier="three", patience_s=1.0
                )
                await asker.open()
                late = await asker.ask(Question(parts, "two"))
                now = await asker.ask(Question(parts, "three"))
                with pytest.raises(HubError, match="no tier 'five'") as caught:
                    await asker.ask(Question(parts, "five"))
                assert caught.value.code == "unknown_tier"
                await asker.close("done")
            model = build()
            model.load(tmp_path / "run" / "model.safetensors")
            with torch.no_grad():
                h = torch.from_numpy(parts["h"])
                above = model.block[2](h)
                whole = [model.aux["3"](above), model.head(model.block[3](above))]
                skipping = model.head(model.block[3](h))
            assert late.heads == ["aux.3", "head"]
            np.testing.assert_allclose(late.logits, torch.stack(whole).numpy(), atol=1e-5)
            assert now.heads == ["head"]
            np.testing.assert_allclose(now.logits, skipping[None].numpy(), atol=1e-5)

    run(job(), 30)


class OtherEnd:
    """The hub's end of a link in memory, which sends what a test tells it to."""

    def __init__(self) -> None:
        mine, self.link = MemoryLink.pair()
        self._link, self._channel = mine, Channel()

    async def open(self) -> Link:
        """Open the device's end."""
        return self.link

    async def welcome(self) -> None:
        """Answer the hello."""
        decode(await self._link.receive())
        welcome = Welcome(VERSION, "a", "two", "s", False, 0, HASH, 16, 2**20)
        await self._link.send(encode(welcome, 0, 0))

    async def say(self, message: Message) -> None:
        """Send a message."""
        await self._link.send(self._channel.send(message))

    async def settled(self) -> None:
        """Wait until all messages are acknowledged."""
        while self._channel.unacked:
            self._channel.receive(await self._link.receive())

    async def part(self) -> None:
        """Receive the bye."""
        while (delivery := self._channel.receive(await self._link.receive())) is None or (
            not delivery.seq
        ):
            pass
        self._channel.settle(delivery.seq)
        await self._link.send(self._channel.send(Ack()))


@pytest.mark.parametrize(
    "end",
    [
        Round(2, HASH, 1, 8, {}, "returned", 0),
        Move("three", HASH, "for a test"),
        Stop("for a test"),
    ],
    ids=lambda end: end.TYPE,
)
def test_a_round_ends_with_what_comes_after_it(end: Message) -> None:
    """The waiting device is told; gradients that have arrived, or arrive later, are dropped."""

    async def conversation() -> None:
        hub = OtherEnd()
        connection = Connection(hub.open, token="t", tier=None, patience_s=1.0)
        opening = asyncio.create_task(connection.open())
        await hub.welcome()
        await opening
        await hub.say(Round(1, HASH, 1, 8, {}, "returned", 0))
        session, delivery = await connection.next_work()
        session.settle(delivery.seq)
        parts = {"h": np.ones((2, 3), np.float32)}
        await hub.say(Gradient(1, 0, parts))
        assert (await connection.replies.wait(Gradient, session, 1, 0)).parts.keys() == parts.keys()
        await hub.say(Gradient(1, 2, parts))
        waiting = asyncio.create_task(connection.replies.wait(Gradient, session, 1, 1))
        await asyncio.sleep(0)
        await hub.say(end)
        with pytest.raises(RoundOver, match="round 1 is over"):
            await waiting
        await hub.say(Gradient(1, 3, parts))
        _, delivery = await connection.next_work()
        session.settle(delivery.seq)
        await hub.settled()
        for batch in range(4):
            with pytest.raises(RoundOver):
                connection.replies.take(Gradient, session, 1, batch)
            with pytest.raises(RoundOver):
                await connection.replies.wait(Gradient, session, 1, batch)
        if isinstance(end, Round):
            await hub.say(Gradient(2, 0, parts))
            assert (
                await connection.replies.wait(Gradient, session, 2, 0)
            ).parts.keys() == parts.keys()
        await asyncio.gather(connection.close("done"), hub.part())

    run(conversation(), 30)


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_device_moves_between_processes(tmp_path: Path, bundles: BundleIndex) -> None:
    """With FedSplitX and an evaluating hub, a device alone is fastest at cut 1."""
    token = TokenFile(tmp_path / "tokens.toml").issue("phone", "large")
    config = tmp_path / "hub.toml"
    config.write_text(
        f'bundles = "{bundles.folder}"\ntokens = "{tmp_path / "tokens.toml"}"\n'
        f'run = "{tmp_path / "run"}"\n[listen]\nport = 0\n[rounds]\ncount = 3\n'
        "[local]\nepochs = 30\nbatch_size = 4\nhyper = { lr = 0.05 }\n"
        '[trunk]\ndevice = "cpu"\nthreads = 1\n'
        'hyper = { lr = 0.05 }\n[cuts]\npolicy = "latency"\n'
    )
    hub = cutlayer("hub", "--config", str(config), "--json")
    device = cutlayer(
        "device", "--url", next_event(hub, "ready")["address"],
        "--data", str(save_npz(tmp_path / "data.npz", images(60))),
        "--cache", str(tmp_path / "cache"), "--json", CUTLAYER_TOKEN=token,
    )  # fmt: skip
    code, out, err = finish(device)
    assert code == 0, err
    assert json.loads(out)["tier"] == "small"
    code, out, err = finish(hub)
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["cuts"] for event in rounds] == [{"phone": 3}, {"phone": 1}, {"phone": 1}]
    assert "phone goes from cut 3 to 1: a round takes it" in err
