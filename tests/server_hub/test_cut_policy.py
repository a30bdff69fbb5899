"""Policies of cuts, against figures computed by hand and over random fleets."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_hub.rounds.cut_policy import Adaptive, Fixed, Latency, Seen, policy_of

times = st.floats(1e-4, 1e3)
losses = st.floats(0.0, 1e3)


@st.composite
def a_seen(draw: st.DrawFn, known: bool = False) -> Seen:
    """A device with some options; with ``known``, it has a time and a loss."""
    options = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=5)))
    unknown = st.nothing() if known else st.none()
    return Seen(
        draw(st.sampled_from(options)), options, draw(times | unknown), draw(losses | unknown)
    )


fleets = st.dictionaries(st.sampled_from("abcdef"), a_seen(), max_size=6)
known_fleets = st.dictionaries(st.sampled_from("abcdef"), a_seen(known=True), min_size=1)


def slowest_at_its_shallowest(fleet: dict[str, Seen]) -> float:
    """Return the seconds per batch of the shortest possible round."""
    return max(
        s.compute_s / s.cut * s.options[0] for s in fleet.values() if s.compute_s is not None
    )


# --- fixed and latency ----------------------------------------------------------------------------


@given(fleets)
def test_fixed_moves_nobody(fleet: dict[str, Seen]) -> None:
    assert Fixed().targets(fleet, 0.0) == {}


def test_latency_by_hand() -> None:
    """The slow device takes 0.4 s for two blocks and 0.2 s for one; the fast one 0.05 s each."""
    fleet = {
        "slow": Seen(2, [1, 2, 3], 0.4, None),
        "fast": Seen(2, [1, 2, 3, 4], 0.1, None),
        "small": Seen(1, [1, 2], 0.01, None),
    }
    targets = Latency().targets(fleet, 0.0)
    assert {device: target.cut for device, target in targets.items()} == {
        "slow": 1, "fast": 4, "small": 2,
    }  # fmt: skip
    assert targets["fast"].reason == ("a round takes it 0.1 s at cut 2; 0.2 s fit into 0.22 s")


def test_a_step_may_take_a_tenth_longer_than_its_share() -> None:
    """Measured times vary: 1.09 of the bound fits, and 1.11 does not."""
    for compute_s, cut in ((1.09, 2), (1.11, 1)):
        fleet = {"slow": Seen(1, [1], 1.0, None), "other": Seen(2, [1, 2], compute_s, None)}
        assert Latency().targets(fleet, 0.0)["other"].cut == cut


@given(fleets)
def test_latency_gives_the_deepest_cuts_that_fit(fleet: dict[str, Seen]) -> None:
    """A search of all options confirms that the cut fits and that no deeper cut fits."""
    targets = Latency().targets(fleet, 0.0)
    assert targets.keys() == {d for d, seen in fleet.items() if seen.compute_s is not None}
    for device, target in targets.items():
        seen = fleet[device]
        assert target.cut in seen.options
        bound = 1.1 * slowest_at_its_shallowest(fleet)
        assert seen.compute_s is not None
        each = seen.compute_s / seen.cut
        assert each * target.cut <= bound * (1 + 1e-9)
        for deeper in seen.options:
            if deeper > target.cut:
                assert each * deeper > bound * (1 - 1e-9)


@given(known_fleets)
def test_a_fleet_at_its_targets_is_as_fast_as_it_can_be(fleet: dict[str, Seen]) -> None:
    """No round is longer than that of the slowest device at its shallowest cut, up to tolerance."""
    targets = Latency().targets(fleet, 0.0)
    longest = max(s.compute_s / s.cut * targets[d].cut for d, s in fleet.items() if s.compute_s)
    assert longest <= 1.1 * slowest_at_its_shallowest(fleet) * (1 + 1e-9)


def test_devices_whose_steps_take_no_time_go_as_deep_as_they_can() -> None:
    """This is a simulation without a limit on the devices' compute."""
    fleet = {"a": Seen(1, [1, 2, 3], 0.0, None), "b": Seen(2, [1, 2], 0.0, None)}
    assert {d: t.cut for d, t in Latency().targets(fleet, 0.0).items()} == {"a": 3, "b": 2}


# --- adaptive -------------------------------------------------------------------------------------


def weights_by_hand(rounds: list[dict[str, float]], gamma: float) -> dict[str, float]:
    """``w <- w (1 + gamma (p - mean p))`` within 1/2 and 3/2; p is relative to the best."""
    weights: dict[str, float] = {}
    for found in rounds:
        p = {d: math.exp(-loss) / math.exp(-min(found.values())) for d, loss in found.items()}
        mean = sum(p.values()) / len(p)
        for d in found:
            w = weights.get(d, 1.0) * (1 + gamma * (p[d] - mean))
            weights[d] = min(1.5, max(0.5, w))
    return weights


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0, 20), min_size=1), min_size=1))
def test_weights_are_those_of_the_formula(rounds: list[dict[str, float]]) -> None:
    policy = Adaptive()
    for found in rounds:
        policy.targets({d: Seen(1, [1, 2], 0.1, loss) for d, loss in found.items()}, 1.0)
    expected = weights_by_hand(rounds, policy.gamma)
    assert policy.state()["weights"] == pytest.approx(expected, rel=1e-9)


@given(st.lists(fleets, min_size=1, max_size=8), st.floats(0, 10))
def test_adaptive_stays_within_its_bounds(rounds: list[dict[str, Seen]], gamma: float) -> None:
    """Targets are always options, and never deeper than the latency policy allows."""
    policy = Adaptive(gamma=gamma, patience=1)
    for fleet in rounds:
        limits = Latency().targets(fleet, 0.0)
        for device, target in policy.targets(fleet, 1.0).items():
            seen = fleet[device]
            assert target.cut in seen.options
            assert target.cut != seen.cut
            assert target.cut <= limits[device].cut
            allowed = [cut for cut in seen.options if cut <= limits[device].cut]
            assert target.cut in allowed[-2:], "one option below the limit at most"
        assert all(0.5 <= weight <= 1.5 for weight in policy.state()["weights"].values())


def test_who_falls_behind_is_given_one_option_less() -> None:
    """By hand: the weights of two devices diverge by a factor of 3, until the bounds stop them."""
    fleet = {
        "good": Seen(3, [1, 2, 3], 0.1, 0.0),
        "bad": Seen(3, [1, 2, 3], 0.1, 9.0),
        "slow": Seen(1, [1], 0.2, None),  # sets the bound; without a loss it keeps its weight
    }
    policy = Adaptive(patience=1)
    assert policy.targets(fleet, 1.0) == {}, "0.75003 of the mean is not yet behind"
    assert policy.state()["weights"] == pytest.approx({"good": 1.25, "bad": 0.75}, rel=1e-3)
    targets = policy.targets(fleet, 1.0)
    assert policy.state()["weights"] == pytest.approx({"good": 1.5, "bad": 0.5625}, rel=1e-3)
    assert {d: t.cut for d, t in targets.items()} == {"bad": 2}
    assert "; its weight is 0.55 of the mean, " in targets["bad"].reason


def test_who_can_carry_one_cut_only_keeps_it_however_it_does() -> None:
    fleet = {"good": Seen(1, [1], 0.1, 0.0), "bad": Seen(1, [1], 0.1, 9.0)}
    policy = Adaptive(patience=1)
    for _ in range(5):
        assert policy.targets(fleet, 1.0) == {}


@given(st.integers(1, 5))
def test_a_device_moves_once_its_target_has_stood(patience: int) -> None:
    policy = Adaptive(patience=patience)
    fleet = {"a": Seen(1, [1, 2], 0.1, 1.0), "slow": Seen(1, [1], 0.5, 1.0)}
    for _ in range(patience - 1):
        assert policy.targets(fleet, 1.0) == {}
    assert policy.targets(fleet, 1.0)["a"].cut == 2
    assert policy.targets(fleet, 1.0)["a"].cut == 2, "and goes on to be named until it has moved"
    moved = {**fleet, "a": Seen(2, [1, 2], 0.2, 1.0)}
    assert policy.targets(moved, 1.0) == {}


@given(st.integers(2, 4), st.integers(1, 20))
def test_targets_that_alternate_never_move_a_device(patience: int, rounds: int) -> None:
    """The time of a device is alternately above and below the bound."""
    policy = Adaptive(patience=patience)
    for number in range(rounds):
        compute_s = 0.2 if number % 2 else 0.9
        fleet = {"a": Seen(2, [1, 2, 3], compute_s, 1.0), "slow": Seen(1, [1], 0.4, 1.0)}
        assert "a" not in policy.targets(fleet, 1.0)


@given(st.lists(fleets, max_size=6), st.lists(fleets, min_size=1, max_size=6))
def test_a_policy_goes_on_from_its_state_as_if_nothing_had_been(
    before: list[dict[str, Seen]], after: list[dict[str, Seen]]
) -> None:
    for name in ("fixed", "latency", "adaptive"):
        whole, resumed = policy_of(name), policy_of(name)  # type: ignore[arg-type]
        for fleet in before:
            whole.targets(fleet, 1.0)
        resumed.restore(json.loads(json.dumps(whole.state())))
        for fleet in after:
            assert resumed.targets(fleet, 1.0) == whole.targets(fleet, 1.0)
        assert resumed.state() == whole.state()


# --- missing measurements -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed", "latency", "adaptive"])
def test_devices_that_say_nothing_stay(name: str) -> None:
    """They have neither a time nor a loss, in a fleet of one, of several, or of none."""
    policy = policy_of(name)  # type: ignore[arg-type]
    for fleet in ({}, {"a": Seen(1, [1, 2], None, None)},
                  {d: Seen(2, [1, 2, 3], None, None) for d in "abc"}):  # fmt: skip
        for _ in range(4):
            assert policy.targets(fleet, 1.0) == {}


@given(st.sampled_from(["latency", "adaptive"]), fleets)
def test_who_does_not_say_its_time_stays_whatever_the_others_do(
    name: str, fleet: dict[str, Seen]
) -> None:
    policy = policy_of(name)  # type: ignore[arg-type]
    fleet = {**fleet, "silent": Seen(1, [1, 2], None, 0.5)}
    for _ in range(3):
        assert "silent" not in policy.targets(fleet, 1.0)


def test_who_has_no_loss_counts_as_the_mean() -> None:
    """Without activations a device has no loss, so its weight remains 1."""
    policy = Adaptive(patience=1)
    fleet = {"a": Seen(2, [1, 2], 0.1, None), "slow": Seen(1, [1], 0.5, 1.0)}
    assert policy.targets(fleet, 1.0) == {}
    assert "a" not in policy.state()["weights"]


def test_nobody_goes_deeper_while_the_hub_has_time_to_spare() -> None:
    """The slowest device always moves to shallower cuts; others go deeper if the hub is full."""
    fleet = {
        "slow": Seen(2, [1, 2, 3], 0.4, 1.0),
        "fast": Seen(2, [1, 2, 3, 4], 0.1, 1.0),
    }
    for busy, fast in ((0.0, None), (0.79, None), (0.8, 4), (1.0, 4)):
        policy = Adaptive(patience=1)
        cuts = {d: target.cut for d, target in policy.targets(fleet, busy).items()}
        assert cuts == {"slow": 1} | ({} if fast is None else {"fast": fast})
