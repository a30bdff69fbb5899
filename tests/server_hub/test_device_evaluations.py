"""Evaluation on devices: what the hub makes of what they say, and what it does not believe."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.channel import Channel
from edge_sdk.protocol.evaluation import Evaluate, Evaluated
from edge_sdk.protocol.frames import decode
from edge_sdk.protocol.message import EVALUATION
from edge_sdk.protocol.messages import Message, Round, Stop
from edge_sdk.transport.session import Session
from server_hub.gateway.blobs import BlobServer
from server_hub.gateway.limits import Limits
from server_hub.gateway.peers import Peer
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.method import ALL_PATHS
from server_hub.methods.plan import ModelOffer
from server_hub.rounds.device_evaluations import DeviceEvaluations
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation import clock
from tests.lib.harness import examples, hub_config, running_hub
from tests.lib.raw_client import GOOD, RawClient, good_update, raw
from tests.lib.tasks import run

HASH = "0" * 64
PATHS = ("device_alone", "ensemble")


def peer(device: str, tier: str = "small", able: bool = True) -> Peer:
    """A device that has joined."""
    extensions = frozenset({EVALUATION} if able else ())
    session = Session(Channel(extensions=extensions))
    return Peer(device, tier, "session", session, None, download_only=False, release=None)


class Asking:
    """Evaluations of a model of classes or of tokens, and what they have sent."""

    def __init__(self, task: str = "classes", within_s: float = 5) -> None:
        self.sent: list[tuple[str, Message]] = []
        blobs = BlobServer([], 1)
        blobs.publish({"small": ModelOffer(HASH), "mixed": ModelOffer(bases={"1": HASH})}, {})
        self.evaluations = DeviceEvaluations(
            ["small", "mixed"],
            task,
            PATHS,
            within_s,
            Limits(samples=1000),
            blobs,
            lambda peer, message: self.sent.append((peer.device, message)),
        )

    def says(self, peer: Peer, number: int, labels: int, *values: float) -> None:
        """A device answers."""
        results = dict(zip(PATHS, values, strict=True)) if labels else {}
        self.evaluations.take(peer, Evaluated(number=number, labels=labels, results=results))


def asking(test: Callable[[Asking], Any], **options: Any) -> None:
    """Run a test on the virtual clock."""

    async def main() -> None:
        await test(Asking(**options))

    clock.run(lambda loop: main(), 0.0)


def test_devices_are_asked_for_their_tier_s_model() -> None:
    async def test(hub: Asking) -> None:
        one, other, old = peer("a"), peer("b", "mixed"), peer("c", able=False)
        assert hub.evaluations.begin(3, [one, other, old]) is not None
        asked = dict(hub.sent)
        paths = list(PATHS)
        assert asked == {
            "a": Evaluate(3, paths, 5, HASH),
            "b": Evaluate(3, paths, 5, None, {"1": HASH}),
        }

    asking(test)


@pytest.mark.parametrize("within_s", [0.0, 5.0])
def test_nobody_is_asked_where_nobody_keeps_examples_back(within_s: float) -> None:
    """Or where the operator wants no evaluation."""

    async def test(hub: Asking) -> None:
        assert hub.evaluations.begin(1, [peer("a", able=within_s == 0)]) is None
        hub.says(peer("a"), 1, 10, 0.5, 0.5)
        assert not hub.sent

    asking(test, within_s=within_s)


def test_the_mean_is_weighted_within_bounds_and_quantiles_are_over_devices() -> None:
    """A device that claims much more than the others counts as twice the lower median."""

    async def test(hub: Asking) -> None:
        peers = [peer(name) for name in "abcd"] + [peer("e", "mixed"), peer("f", able=False)]
        figures = hub.evaluations.begin(7, peers)
        assert figures is not None
        claims = [(10, 0.1, 0.2), (20, 0.4, 0.4), (30, 0.6, 0.5), (1000, 1.0, 0.9)]
        for device, (labels, *values) in zip(peers, claims, strict=False):
            assert not figures.done()
            hub.says(device, 7, labels, *values)
        hub.says(peers[4], 7, 0)
        assert figures.done()
        found = await figures
        assert (found["asked"], found["answered"], found["silent"], found["without"]) == (
            5,
            4,
            0,
            2,
        )
        assert list(found["tiers"]) == ["small"]
        tier = found["tiers"]["small"]
        assert (tier["devices"], tier["labels"]) == (4, 1060)
        weighted = (10 * 0.1 + 20 * 0.4 + 30 * 0.6 + 40 * 1.0) / 100
        alone = tier["paths"]["device_alone"]
        assert alone["mean"] == pytest.approx(weighted)
        assert alone["p50"] == pytest.approx(0.5)
        assert alone["p10"] == pytest.approx(0.1 + 0.3 * 0.3)  # at place 0.3 of 0, 1, 2, 3
        assert alone["p90"] == pytest.approx(0.6 + 0.7 * 0.4)

    asking(test)


@given(
    claims=st.lists(
        st.tuples(st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12
    ),
    tokens=st.booleans(),
)
def test_the_summary_is_that_of_an_independent_computation(
    claims: list[tuple[int, float, float]], tokens: bool
) -> None:
    """Of tokens, the mean is the perplexity of the mean cross-entropy."""

    async def test(hub: Asking) -> None:
        peers = [peer(f"device-{i:02d}") for i in range(len(claims))]
        figures = hub.evaluations.begin(1, peers)
        assert figures is not None
        for device, (labels, *values) in zip(peers, claims, strict=True):
            hub.says(device, 1, labels, *values)
        tier = (await figures)["tiers"]["small"]
        most = 2 * statistics.median_low([labels for labels, *_ in claims])
        for place, path in enumerate(PATHS, start=1):
            weights = [min(claim[0], most) for claim in claims]
            total = sum(w * c[place] for w, c in zip(weights, claims, strict=True)) / sum(weights)
            values = sorted(math.exp(c[place]) if tokens else c[place] for c in claims)
            found = tier["paths"][path]
            assert found["mean"] == pytest.approx(math.exp(total) if tokens else total)
            for name, part in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
                at = part * (len(values) - 1)
                low, high = values[math.floor(at)], values[math.ceil(at)]
                assert found[name] == pytest.approx(low + (at - math.floor(at)) * (high - low))

    asking(test, task="tokens" if tokens else "classes")


def test_a_silent_device_costs_the_deadline_and_no_more() -> None:
    async def test(hub: Asking) -> None:
        now = asyncio.get_running_loop().time
        one, silent = peer("a"), peer("b")
        figures = hub.evaluations.begin(1, [one, silent])
        assert figures is not None
        hub.says(one, 1, 10, 0.5, 0.75)
        began = now()
        found = await figures
        assert now() - began == pytest.approx(5)
        assert (found["answered"], found["silent"]) == (1, 1)
        hub.says(silent, 1, 10, 1.0, 1.0)  # late: ignored
        assert found["tiers"]["small"]["devices"] == 1

    asking(test)


def test_a_device_that_leaves_is_not_waited_for() -> None:
    async def test(hub: Asking) -> None:
        figures = hub.evaluations.begin(1, [peer("a")])
        assert figures is not None
        hub.evaluations.gone("other")
        assert not figures.done()
        hub.evaluations.gone("a")
        assert (await figures)["silent"] == 1

    asking(test)


def test_what_comes_late_twice_or_unasked_does_not_count() -> None:
    async def test(hub: Asking) -> None:
        one, two = peer("a"), peer("b")
        first = hub.evaluations.begin(1, [one, two])
        assert first is not None
        hub.says(one, 1, 10, 0.5, 0.5)
        hub.says(one, 1, 10, 1.0, 1.0)
        hub.says(peer("stranger"), 1, 10, 1.0, 1.0)
        second = hub.evaluations.begin(2, [one, two])
        assert second is not None
        assert (await first)["tiers"]["small"]["paths"]["ensemble"]["mean"] == 0.5
        hub.says(one, 1, 10, 0.25, 0.25)
        hub.says(one, 2, 10, 0.75, 0.75)
        hub.evaluations.end()
        assert (await second)["tiers"]["small"]["paths"]["ensemble"]["mean"] == 0.75

    asking(test)


@pytest.mark.parametrize(
    ("task", "labels", "results", "field"),
    [
        ("classes", 1001, {"device_alone": 0.5, "ensemble": 0.5}, "labels"),
        ("tokens", 8192 * 1000 + 1, {"device_alone": 0.5, "ensemble": 0.5}, "labels"),
        ("classes", 10, {"device_alone": 0.5}, "results"),
        ("classes", 10, {"device_alone": 0.5, "ensemble": 0.5, "mix": 0.5}, "results"),
        ("classes", 0, {"device_alone": 0.5, "ensemble": 0.5}, "results"),
        ("classes", 10, {}, "results"),
        ("classes", 10, {"device_alone": 1.01, "ensemble": 0.5}, "results"),
        ("classes", 10, {"device_alone": -0.01, "ensemble": 0.5}, "results"),
        ("tokens", 10, {"device_alone": 700.1, "ensemble": 0.5}, "results"),
    ],
)
def test_claims_beyond_bounds_are_refused(
    task: str, labels: int, results: dict[str, float], field: str
) -> None:
    async def test(hub: Asking) -> None:
        one = peer("a")
        hub.evaluations.begin(1, [one])
        with pytest.raises(ProtocolError) as caught:
            hub.evaluations.take(one, Evaluated(number=1, labels=labels, results=results))
        assert (caught.value.code, caught.value.field) == ("bad_message", field)

    asking(test, task=task)


# --- real devices -------------------------------------------------------------------------------


def test_devices_evaluate_over_websockets(tmp_path: Path, bundles: BundleIndex) -> None:
    """The last record agrees with what the devices measure with the final model by themselves.

    One device keeps nothing back, one never answers: the job ends at the deadline all the same.
    """
    rules = RoundRules(count=2, min_devices=4, deadline_s=60)
    config = hub_config(tmp_path, bundles, rounds=rules, evaluation_s=2.0)
    sizes, shares = {"a": 90, "b": 30, "c": 24}, {"a": 0.4, "b": 0.3, "c": 0.0}
    kept: dict[str, int] = {}
    measured: dict[str, Any] = {}

    async def take_part(name: str, url: str, token: str) -> None:
        async with await Device.connect(
            url, token=token, data=examples(sizes[name]), keep_back=shares[name],
            cache=tmp_path / name,
        ) as device:  # fmt: skip
            await device.train()
            kept[name] = len(device.kept_back())
            if kept[name]:
                measured[name] = await device.evaluate(device.kept_back())

    async def stay_silent(url: str, token: str) -> None:
        manifest = bundles.manifest("small")
        async with raw(url) as connection:
            client = RawClient(connection)
            hello = replace(GOOD, token=token, extensions=[EVALUATION])
            task = await client.join(token, 24, hello)
            for _ in range(2):
                await client.say(good_update(manifest, task.round, 24))
                asked = None
                while not isinstance(asked, Round | Stop):
                    asked = decode(await connection.recv(), agreed=[EVALUATION]).message
                task = asked

    async def main() -> list[Any]:
        async with running_hub(config) as (hub, url):
            tokens = TokenFile(config.tokens)
            tiers = {"a": "small", "b": "small", "c": "medium"}
            await asyncio.gather(
                *(take_part(name, url, tokens.issue(name, tier)) for name, tier in tiers.items()),
                stay_silent(url, tokens.issue("d", "small")),
            )
            return list(hub.run.records)

    *_, last = run(main(), 60)
    found = last.on_devices
    assert (found["asked"], found["answered"], found["silent"], found["without"]) == (3, 2, 1, 1)
    assert last.accuracy.keys() == bundles.tiers.keys(), "the hub evaluates beside them"
    small = found["tiers"]["small"]
    assert kept["a"] > 2 * kept["b"] > 0
    assert kept["c"] == 0
    assert (small["devices"], small["labels"]) == (2, kept["a"] + kept["b"])
    for path in ALL_PATHS:
        a, b = (getattr(measured[name], path) for name in "ab")
        # of two devices, the larger counts as twice the smaller
        assert small["paths"][path]["mean"] == pytest.approx((2 * a + b) / 3)
        assert small["paths"][path]["p50"] == pytest.approx((a + b) / 2)
