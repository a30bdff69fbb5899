"""Adversarial examples: the start and the steps of the attack, and its numbers on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.adversarial import Attack

INPUTS = {"epsilon": "epsilon", "rate": "step_size", "low": "low", "high": "high"}
"""The graph's inputs, with the fields of an attack that supply them."""


class Climbing:
    """Replaces a runtime: like ``attack``, a step moves by the step size along a sign."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign
        self.calls: list[dict[str, Array]] = []
        self.results: list[Array] = []

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        assert graph == "attack"
        self.calls.append(dict(batch))
        x, epsilon = batch["x"], batch["epsilon"]
        there = (batch["start"] + np.float32(self.sign) * batch["rate"]).clip(
            x - epsilon, x + epsilon
        )
        self.results.append(there.clip(batch["low"], batch["high"]).astype(np.float32))
        return {"x_adv": self.results[-1]}


def attacks() -> st.SearchStrategy[Attack]:
    """Valid attacks."""
    positive = st.floats(2**-10, 10, width=32)
    return st.builds(
        Attack,
        epsilon=positive,
        step_size=positive,
        steps=st.integers(1, 6),
        low=st.floats(-3, 0, width=32),
        high=st.floats(0.5, 3, width=32),
    )


@settings(max_examples=100, deadline=None)
@given(attack=attacks(), rows=st.integers(1, 4), seed=st.integers(0, 999))
def test_it_starts_near_and_goes_on_from_where_it_was(attack: Attack, rows: int, seed: int) -> None:
    """The attack starts within epsilon and the bounds; each step starts from the last result."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(attack.low, attack.high, (rows, 2, 3)).astype(np.float32)
    x = x.clip(np.float32(attack.low), np.float32(attack.high))
    batch: dict[str, Array] = {"x": x, "y": np.arange(rows), "present": np.ones(4, np.float32)}
    runtime: Any = Climbing(rng.choice([-1.0, 1.0]))
    x_adv = attack.on(runtime, batch, np.random.default_rng(seed))
    assert len(runtime.calls) == attack.steps
    start = runtime.calls[0]["start"]
    assert start.dtype == x.dtype
    assert start.shape == x.shape
    slack = 1e-6 * (1 + attack.epsilon)
    assert np.abs(start - x).max() <= attack.epsilon + slack
    assert np.float32(attack.low) <= start.min()
    assert start.max() <= np.float32(attack.high)
    for call in runtime.calls:
        assert all(call[name] is batch[name] for name in batch)
        for name, field in INPUTS.items():
            assert call[name].dtype == x.dtype
            assert call[name].shape == ()
            assert call[name] == np.float32(getattr(attack, field))
    for before, call in zip(runtime.results, runtime.calls[1:], strict=False):
        assert call["start"] is before
    assert x_adv is runtime.results[-1]
    assert x is batch["x"]


def test_the_start_is_random_over_the_whole_ball() -> None:
    """The start is uniform over the ball around x, and another generator gives another start."""
    x = np.full((50, 40), 0.5, np.float32)
    starts = []
    for seed in (0, 0, 1):
        runtime: Any = Climbing()
        Attack(epsilon=0.3, steps=1).on(
            runtime, {"x": x, "y": np.zeros(50)}, np.random.default_rng(seed)
        )
        starts.append(runtime.calls[0]["start"])
    assert np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])
    moved = starts[0] - x
    assert abs(moved.mean()) < 0.3 * 0.05
    assert moved.std() == pytest.approx(0.3 / 3**0.5, rel=0.05)
    assert np.abs(moved).max() > 0.29


def test_inputs_beyond_the_bounds_are_brought_back() -> None:
    """The start is within the bounds even if the example is not."""
    runtime: Any = Climbing()
    x = np.array([[-4.0, 9.0]], np.float32)
    Attack(epsilon=0.1).on(runtime, {"x": x, "y": np.zeros(1)}, np.random.default_rng(0))
    assert runtime.calls[0]["start"].tolist() == [[0.0, 1.0]]


@given(attack=attacks(), lr=st.floats(1e-3, 1))
def test_devices_are_told_all_of_it(attack: Attack, lr: float) -> None:
    """The numbers of an attack survive the way to a device, beside other hyper-parameters."""
    hyper = attack.to_hyper()
    assert all(name.startswith("attack_") and type(v) is float for name, v in hyper.items())
    assert {n.removeprefix("attack_") for n in hyper} == {*INPUTS, "steps"}
    told = Attack.of({"lr": lr, "robustness": 0.5, **hyper})
    assert told == attack
    assert type(told.steps) is int


def test_the_paper_s_settings_are_the_defaults() -> None:
    """The defaults are those of the Split-Mix paper: 8/255 in seven steps, pixels from 0 to 1."""
    assert asdict(Attack()) == {
        "epsilon": 8 / 255, "step_size": 1.43 / 255, "steps": 7, "low": 0.0, "high": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be above 0 and finite"),
        ({"epsilon": -0.1}, "epsilon is -0.1; it must be above 0 and finite"),
        ({"epsilon": float("inf")}, "epsilon is inf; it must be above 0 and finite"),
        ({"step_size": 0.0}, "step_size is 0.0; it must be above 0 and finite"),
        ({"step_size": float("nan")}, "step_size is nan; it must be above 0 and finite"),
        ({"steps": 0}, "steps is 0; it must be from 1 to 1000"),
        ({"low": 1.0}, "low is 1.0 and high 1.0; low must be below high"),
        ({"high": float("nan")}, "low must be below high"),
    ],
)
def test_what_makes_no_sense(wrong: dict[str, Any], message: str) -> None:
    """Invalid values are refused, both in a configuration and in a message from a hub."""
    with pytest.raises(ValueError, match=message):
        Attack(**wrong)
    wire = {"step_size": "rate"}
    told = Attack().to_hyper() | {f"attack_{wire.get(n, n)}": v for n, v in wrong.items()}
    with pytest.raises(ProtocolError, match=f"hyper: attack: .*{message}") as caught:
        Attack.of(told)
    assert caught.value.field == "hyper"


@pytest.mark.parametrize("name", sorted(Attack().to_hyper()))
def test_what_is_not_told(name: str) -> None:
    """An error names the number that is missing."""
    told = Attack().to_hyper()
    del told[name]
    with pytest.raises(ProtocolError, match=f"hyper lacks {name}"):
        Attack.of(told)


def test_what_is_told_and_not_known() -> None:
    with pytest.raises(ProtocolError, match="hyper has attack_norm"):
        Attack.of({**Attack().to_hyper(), "attack_norm": 2.0})
