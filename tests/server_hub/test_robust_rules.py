"""Robust rules against calculation by hand, and what they say when they cannot help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from server_hub.aggregation.layer_store import LayerCopy, LayerStore
from server_hub.aggregation.robust import RuleName, rule_of
from server_hub.config import HubConfig
from server_hub.methods.settings import MethodConfig
from server_hub.rounds.rounds import RoundRules

ROBUST: tuple[RuleName, ...] = ("trimmed_mean", "median", "krum")


def averaged(
    rule: RuleName, values: Sequence[tuple[float, float]], weight: float = 1
) -> list[float]:
    """Return the average of copies of a layer of two elements; the last has another weight."""
    store = LayerStore({"head.w": np.zeros(2, np.float32)}, rule_of(rule))
    weights = [1.0] * (len(values) - 1) + [weight]
    store.commit(
        LayerCopy("head", {"head.w": np.array(v, np.float32)}, w, f"d{i}")
        for i, (v, w) in enumerate(zip(values, weights, strict=True))
    )
    found: list[float] = store.state()["head.w"].tolist()
    return found


FIVE = [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0), (4.0, 40.0), (1e30, -1e30)]


def test_the_trimmed_mean_leaves_out_a_fifth_at_either_end_of_each_element() -> None:
    assert averaged("trimmed_mean", FIVE, weight=1e6) == pytest.approx([3.0, 20.0])


def test_the_median_is_taken_by_element() -> None:
    assert averaged("median", FIVE, weight=1e6) == pytest.approx([3.0, 20.0])


def test_krum_takes_the_copy_nearest_to_its_neighbours() -> None:
    """With five copies, one of which may be hostile, a score counts two neighbours."""
    values = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (9.0, 0.0), (9.5, 1e3)]
    assert averaged("krum", values) == [1.0, 0.0]


@pytest.mark.parametrize("rule", ROBUST)
def test_a_fifth_of_hostile_copies_does_not_leave_the_range_of_the_others(rule: RuleName) -> None:
    rng = np.random.default_rng(0)
    honest = [(float(a), float(b)) for a, b in rng.uniform(-1, 1, (8, 2))]
    for hostile in ((1e30, 1e30), (-1e30, 0.0), (0.0, 1e9)):
        found = averaged(rule, [*honest, hostile, hostile], weight=1e9)
        assert all(abs(value) <= 1 for value in found)


@pytest.mark.parametrize("rule", ROBUST)
def test_with_four_copies_a_rule_says_that_it_takes_the_mean(
    rule: RuleName, caplog: pytest.LogCaptureFixture
) -> None:
    values = [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (6.0, 0.0)]
    assert averaged(rule, values) == pytest.approx([3.0, 0.0])
    assert f"head has 4 copies in this round; the rule {rule} needs 5" in caplog.text


@pytest.mark.parametrize("rule", ROBUST)
def test_rounds_of_four_devices_are_refused_with_a_robust_rule(rule: RuleName) -> None:
    with pytest.raises(ValueError, match=r"per_round is 4.*fewer than 5"):
        HubConfig(
            Path("b"),
            Path("t"),
            method=MethodConfig(rule=rule),
            rounds=RoundRules(per_round=4),
        )


def test_a_clip_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip is 0\.5"):
        MethodConfig(clip=0.5)
