"""The policy that chooses the number of bases and the robustness, against its rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_sdk.inference.policy import Choice, Condition, MixturePolicy, Thermal, measure_latencies

EIGHT = {1: 0.002, 2: 0.004, 4: 0.008, 8: 0.016}
HEAT: tuple[Thermal, ...] = get_args(Thermal)

parts = st.floats(0, 1)
seconds = st.floats(1e-4, 10)
conditions = st.builds(
    Condition,
    battery=st.none() | parts,
    charging=st.booleans(),
    thermal=st.sampled_from(HEAT),
    latency_s=st.none() | seconds,
    hostile=parts,
)
measured = st.dictionaries(st.integers(2, 16), seconds, max_size=4).flatmap(
    lambda more: seconds.map(lambda one: {1: one, **more})
)
"""Random times, which need not grow with the number of bases, like measured times."""


def takes(latencies: dict[int, float], bases: int) -> Fraction:
    """Return the seconds for a number of bases by exact linear interpolation."""
    below = max(n for n in latencies if n <= bases)
    above = min(n for n in latencies if n >= bases)
    low, high = Fraction(latencies[below]), Fraction(latencies[above])
    return low if below == above else low + (high - low) * (bases - below) / (above - below)


def fits(latencies: dict[int, float], bases: int, budget: float) -> bool:
    """Return whether a number of bases fits the budget, up to rounding."""
    return takes(latencies, bases) <= Fraction(budget) * (1 + Fraction(1, 10**9))


@given(measured, parts, conditions)
def test_at_least_one_base_and_never_more_than_there_are(
    latencies: dict[int, float], low: float, now: Condition
) -> None:
    """Under any condition the number is from 1 to all, and the robustness is the requested one."""
    choice = MixturePolicy(latencies, low_battery=low).choose(now)
    assert 1 <= choice.bases <= max(latencies)
    assert choice.robustness == now.hostile
    assert choice.reason.endswith(".")


@given(measured, parts, conditions, parts, parts)
def test_more_charge_never_means_fewer_bases(
    latencies: dict[int, float], low: float, now: Condition, one: float, other: float
) -> None:
    """Mains power and charging allow as many bases as a full battery."""
    policy = MixturePolicy(latencies, low_battery=low)
    now = replace(now, charging=False)
    less, more = (policy.choose(replace(now, battery=b)).bases for b in sorted((one, other)))
    mains = policy.choose(replace(now, battery=None)).bases
    charging = policy.choose(replace(now, battery=one, charging=True)).bases
    assert less <= more <= mains == charging


@given(measured, conditions)
def test_more_heat_never_means_more_bases(latencies: dict[int, float], now: Condition) -> None:
    """From nominal to critical heat, the number of bases never grows."""
    policy = MixturePolicy(latencies)
    bases = [policy.choose(replace(now, thermal=t)).bases for t in HEAT]
    assert bases == sorted(bases, reverse=True)
    assert bases[-1] == 1


@given(measured, conditions, seconds, seconds)
def test_more_time_never_means_fewer_bases(
    latencies: dict[int, float], now: Condition, one: float, other: float
) -> None:
    """No budget allows as many bases as the longest budget."""
    policy = MixturePolicy(latencies)
    less, more = (policy.choose(replace(now, latency_s=s)).bases for s in sorted((one, other)))
    assert less <= more <= policy.choose(replace(now, latency_s=None)).bases


@given(measured, conditions, seconds)
def test_what_is_chosen_is_in_time_if_one_base_is(
    latencies: dict[int, float], now: Condition, budget: float
) -> None:
    """This also holds if more bases were measured to be faster than fewer."""
    choice = MixturePolicy(latencies).choose(replace(now, latency_s=budget))
    if latencies[1] <= budget:
        assert fits(latencies, choice.bases, budget)


@given(measured, seconds)
def test_a_budget_alone_allows_the_most_bases_that_are_in_time(
    latencies: dict[int, float], budget: float
) -> None:
    """No larger number of bases fits the budget."""
    choice = MixturePolicy(latencies).choose(Condition(latency_s=budget))
    for n in range(choice.bases + 1, max(latencies) + 1):
        assert takes(latencies, n) > Fraction(budget) * (1 - Fraction(1, 10**9))


@given(st.integers(1, 16), conditions, parts)
def test_without_a_budget_the_rules_of_the_table_hold(
    total: int, now: Condition, low: float
) -> None:
    """Each rule holds alone, and together the smallest number counts."""
    heat = {"nominal": total, "fair": total // 2, "serious": total // 4, "critical": 1}
    allowed = [heat[now.thermal]]
    if now.battery is not None and not now.charging:
        if now.battery <= low:
            allowed.append(1)
        elif now.battery < 0.5:
            allowed.append(total // 2)
    policy = MixturePolicy({1: 1.0, total: 1.0}, low_battery=low)
    choice = policy.choose(replace(now, latency_s=None))
    assert choice.bases == max(1, min(allowed))


def test_a_phone_answers_best_when_full_cheaply_when_low_and_robustly_in_the_rain() -> None:
    """A full, a low and an attacked device choose by the rules, out of eight bases."""
    policy = MixturePolicy(EIGHT)
    full = policy.choose(Condition(battery=0.8))
    assert full == Choice(8, 0.0, "Nothing limits the mix of all 8 bases.")
    low = policy.choose(Condition(battery=0.15))
    assert low == Choice(1, 0.0, "The battery at 15 % allows 1 of 8 bases.")
    rain = policy.choose(Condition(hostile=0.7))
    assert rain == Choice(
        8, 0.7, "Nothing limits the mix of all 8 bases; hostile input at 0.7 sets the robustness."
    )


@pytest.mark.parametrize(
    ("now", "bases", "reason"),
    [
        (Condition(battery=0.2), 1, "The battery at 20 % allows 1 of 8 bases."),
        (Condition(battery=0.21), 4, "The battery at 21 % allows 4 of 8 bases."),
        (Condition(battery=0.499), 4, "The battery at 49.9 % allows 4 of 8 bases."),
        (Condition(battery=0.5), 8, "Nothing limits the mix of all 8 bases."),
        (Condition(battery=0.1, charging=True), 8, "Nothing limits the mix of all 8 bases."),
        (Condition(thermal="fair"), 4, "The thermal level 'fair' allows 4 of 8 bases."),
        (Condition(thermal="serious"), 2, "The thermal level 'serious' allows 2 of 8 bases."),
        (Condition(thermal="critical"), 1, "The thermal level 'critical' allows 1 of 8 bases."),
        (Condition(latency_s=0.005), 2, "2 of 8 bases fit into 5 ms."),
        (Condition(latency_s=0.004), 2, "2 of 8 bases fit into 4 ms."),
        (Condition(latency_s=0.003), 1, "1 of 8 bases fits into 3 ms."),
        (Condition(latency_s=0.013), 6, "6 of 8 bases fit into 13 ms."),
        (Condition(latency_s=1.5), 8, "Nothing limits the mix of all 8 bases."),
        (Condition(latency_s=0.0015), 1, "Not even 1 of 8 bases fits into 1.5 ms: it takes 2 ms."),
    ],
)
def test_the_reason_names_what_decided(now: Condition, bases: int, reason: str) -> None:
    """The reason is one sentence with the number that decided."""
    assert MixturePolicy(EIGHT).choose(now) == Choice(bases, 0.0, reason)


@pytest.mark.parametrize(
    ("now", "bases", "reason"),
    [
        (Condition(0.4, False, "serious", 0.013), 2, "The thermal level 'serious' allows"),
        (Condition(0.4, False, "fair", 0.013), 4, "The thermal level 'fair' allows"),
        (Condition(0.1, False, "serious", 0.013), 1, "The battery at 10 % allows"),
        (Condition(0.4, False, "fair", 0.007), 3, "3 of 8 bases fit into 7 ms"),
        (Condition(0.1, False, "critical", 0.001), 1, "Not even 1 of 8 bases fits into 1 ms"),
    ],
)
def test_the_smallest_number_wins(now: Condition, bases: int, reason: str) -> None:
    """The smallest of heat, battery and latency decides; if equal, the first of them is named."""
    choice = MixturePolicy(EIGHT).choose(now)
    assert choice.bases == bases
    assert choice.reason.startswith(reason)


def test_a_larger_number_that_is_faster_does_not_excuse_a_smaller_one() -> None:
    """Heat allows 2 of 4 bases, and only 1 and 4 fit the budget."""
    choice = MixturePolicy({1: 0.001, 2: 0.004, 4: 0.002}).choose(
        Condition(thermal="fair", latency_s=0.002)
    )
    assert choice == Choice(1, 0.0, "1 of 4 bases fits into 2 ms.")


def test_a_budget_of_seconds_is_written_in_seconds() -> None:
    """Budgets of one second or more are written in seconds."""
    choice = MixturePolicy({1: 0.9, 2: 1.4}).choose(Condition(latency_s=1.25))
    assert choice.reason == "1 of 2 bases fits into 1.25 s."


def test_a_single_base_is_limited_by_nothing_but_time() -> None:
    """With a single base, battery and heat have nothing to reduce."""
    policy = MixturePolicy({1: 0.5})
    assert "Nothing limits" in policy.choose(Condition(0.1, thermal="critical")).reason
    assert "Not even 1" in policy.choose(Condition(latency_s=0.1)).reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"battery": 80}, "battery must be from 0 to 1, not 80"),
        ({"battery": -0.1}, "battery must be from 0 to 1, not -0.1"),
        ({"battery": math.nan}, "battery must be from 0 to 1, not nan"),
        ({"hostile": 1.01}, "hostile must be from 0 to 1, not 1.01"),
        ({"hostile": -1.0}, "hostile must be from 0 to 1, not -1.0"),
        ({"hostile": math.nan}, "hostile must be from 0 to 1, not nan"),
        ({"latency_s": 0}, "latency_s must be more than 0 seconds, not 0"),
        ({"latency_s": -1.0}, "latency_s must be more than 0 seconds, not -1.0"),
        ({"latency_s": math.nan}, "latency_s must be more than 0 seconds, not nan"),
        (
            {"thermal": "moderate"},
            "thermal must be one of nominal, fair, serious, critical, not 'moderate'",
        ),
    ],
)
def test_a_condition_out_of_range_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    """Values out of range are not clipped."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        Condition(**fields)


@pytest.mark.parametrize(
    ("latencies", "message"),
    [
        ({}, "latencies are empty"),
        ({1: 0.0}, r"latencies\[1\] must be a positive number of seconds, not 0.0"),
        ({1: 1.0, 2: -1.0}, r"latencies\[2\] must be a positive number"),
        ({1: math.nan}, r"latencies\[1\] must be a positive number"),
        ({1: math.inf}, r"latencies\[1\] must be a positive number"),
        ({0: 1.0, 1: 1.0}, "a number of bases must be a whole number from 1, not 0"),
        ({"1": 1.0}, "a number of bases must be a whole number from 1, not '1'"),
        ({2: 1.0, 4: 2.0}, "latencies have no time for 1 base"),
    ],
)
def test_latencies_that_cannot_be_are_refused(latencies: dict[int, float], message: str) -> None:
    """Such latencies are refused when the policy is created."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        MixturePolicy(latencies)


@pytest.mark.parametrize("low", [-0.1, 20, math.nan])
def test_a_low_battery_out_of_range_is_refused(low: float) -> None:
    """A value in per cent, for example, is refused."""
    with pytest.raises(ConfigError, match=r"^low_battery must be from 0 to 1"):
        MixturePolicy(EIGHT, low_battery=low)


class Clock:
    """A clock that advances by the next given number of seconds whenever bases are mixed."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.now = 100.0
        self.seconds = {n: iter(s) for n, s in seconds.items()}
        self.calls: list[int] = []

    def perf_counter(self) -> float:
        """Return the seconds of the clock."""
        return self.now

    def mix(self, bases: int) -> None:
        """Advance the clock by the next given time."""
        self.calls.append(bases)
        self.now += next(self.seconds[bases])


def test_the_median_of_the_repeats_counts_and_the_first_run_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One slow run and a slow start do not change the median."""
    clock = Clock({1: [64.0, 1.0, 32.0, 2.0], 4: [64.0, 4.0, 3.0, 5.0]})
    monkeypatch.setattr("edge_sdk.inference.policy.time", clock)
    assert measure_latencies(clock.mix, [1, 4], repeats=3) == {1: 2.0, 4: 4.0}
    assert clock.calls == [1] * 4 + [4] * 4


def test_what_was_measured_makes_a_policy() -> None:
    """Latencies measured with the real clock are valid for a policy."""
    sizes: list[int] = []
    run: Callable[[int], None] = sizes.append
    latencies = measure_latencies(run, [1, 2, 4])
    assert len(sizes) == 3 * (1 + 5)
    assert MixturePolicy(latencies).choose(Condition()).bases == 4


@pytest.mark.parametrize(
    ("bases", "repeats", "message"),
    [([1], 0, "repeats must be at least 1, not 0"), ([1, 0], 5, "a number of bases must be")],
)
def test_measuring_nothing_is_refused(bases: list[int], repeats: int, message: str) -> None:
    """The arguments are refused before any run."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        measure_latencies(lambda n: pytest.fail("must not run"), bases, repeats)
