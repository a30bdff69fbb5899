"""What a device says about itself counts within bounds: examples, times and metrics."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import Error, Ready, Welcome
from server_hub.gateway.limits import Limits
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.cut_policy import Latency, Seen
from server_hub.rounds.validation import check_samples, checked_metrics, counted_samples
from tests.lib.harness import hub_config, running_hub
from tests.lib.raw_client import GOOD, RawClient, raw


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 2**63 - 1), min_size=1, max_size=12))
def test_no_device_counts_for_more_than_three_times_the_median(claimed: dict[str, int]) -> None:
    counted = counted_samples(claimed, 3.0)
    ordered = sorted(claimed.values())
    most = 3 * ordered[(len(ordered) - 1) // 2]
    assert counted == {device: min(samples, most) for device, samples in claimed.items()}


def test_examples_within_the_bound_count_as_they_are() -> None:
    assert counted_samples({"a": 40, "b": 100, "c": 300}, 3.0) == {"a": 40, "b": 100, "c": 300}
    assert counted_samples({"a": 40, "b": 100, "c": 10**9}, 3.0) == {"a": 40, "b": 100, "c": 300}
    assert counted_samples({"a": 10, "b": 10**9}, 3.0) == {"a": 10, "b": 30}
    assert counted_samples({"a": 40, "b": 10**9}, math.inf) == {"a": 40, "b": 10**9}
    assert counted_samples({}, 3.0) == {}


def test_more_examples_than_the_operator_allows_are_refused() -> None:
    check_samples(1000, 1000)
    with pytest.raises(ProtocolError, match="1001 examples; a device may have 1000 at most"):
        check_samples(1001, 1000)


def test_a_hub_refuses_a_device_that_claims_too_many_examples(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    async def scenario() -> None:
        config = hub_config(tmp_path, bundles, limits=Limits(samples=500))
        token = TokenFile(config.tokens).issue("liar")
        async with running_hub(config) as (hub, url), raw(url) as connection:
            client = RawClient(connection)
            await client.say(replace(GOOD, token=token))
            await client.hear(Welcome)
            await client.say(Ready(samples=501))
            error = await client.hear(Error)
            assert (error.code, error.field) == ("bad_message", "samples")
            assert "liar" not in hub.rounds.ready

    asyncio.run(scenario())


@given(
    compute=st.floats(allow_nan=False, allow_infinity=False),
    wait=st.floats(allow_nan=False, allow_infinity=False),
    seconds=st.floats(0, 1e6),
)
def test_times_are_at_most_those_of_the_hubs_clock(
    compute: float, wait: float, seconds: float
) -> None:
    checked = checked_metrics({"compute_s": compute, "wait_s": wait}, seconds)
    assert min(checked.values()) >= 0
    assert sum(checked.values()) <= seconds * (1 + 1e-12)
    if 0 <= compute <= seconds and 0 <= wait <= seconds - compute:
        assert checked == {"compute_s": compute, "wait_s": wait}


def test_metrics_stay_numbers_that_can_be_summed() -> None:
    checked = checked_metrics({"loss": 1e308, "accuracy": -1e308, "other": 3.0}, 1.0)
    assert checked == {"loss": 1e12, "accuracy": -1e12, "other": 3.0}
    assert checked_metrics({"loss": -5.0}, 1.0) == {"loss": 0.0}


def test_one_false_time_does_not_move_the_fleet() -> None:
    """The round took 2 s by the hub's clock; a device says that it has computed for a year."""
    true = {"fast": {"compute_s": 0.4}, "slow": {"compute_s": 1.9}, "liar": {"compute_s": 0.4}}
    lied = {**true, "liar": {"compute_s": 3e7}}

    def cuts(said: dict[str, dict[str, float]]) -> dict[str, int]:
        fleet = {
            device: Seen(2, [1, 2, 3, 4, 12], checked_metrics(metrics, 2.0)["compute_s"], None)
            for device, metrics in said.items()
        }
        return {device: target.cut for device, target in Latency().targets(fleet, 0.0).items()}

    assert {d: c for d, c in cuts(lied).items() if d != "liar"} == {
        d: c for d, c in cuts(true).items() if d != "liar"
    }
