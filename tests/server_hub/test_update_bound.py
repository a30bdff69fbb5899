"""The bound on updates: distances by hand, what is left alone, and what is remembered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.protocol.tensors import Array, State
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.merged import Merged
from server_hub.aggregation.nested import Nested
from server_hub.aggregation.per_base import PerBase
from server_hub.aggregation.update_bound import UpdateBound
from server_hub.methods.fedsplitx import fedsplitx
from server_hub.methods.fleet import JobOutline
from server_hub.trunk.interface import TrunkCopy

START: State = {
    "stem.w": np.array([1.0, -2.0], np.float32),
    "block.0.w": np.full((2, 2), 3.0, np.float32),
}


def moved(device: str, by: Mapping[str, float], samples: float = 10) -> DeviceUpdate:
    """Return an update in which every element of a tensor has moved by the same distance."""
    return DeviceUpdate(device, {n: START[n] + np.float32(d) for n, d in by.items()}, samples)


def distances(updates: Sequence[DeviceUpdate], name: str) -> list[float]:
    """Return the root mean square of a tensor's change in each update."""
    return [
        float(np.sqrt(np.mean((u.state[name].astype(float) - START[name]) ** 2))) for u in updates
    ]


def test_an_update_is_shortened_to_three_times_the_median_and_keeps_its_direction() -> None:
    others = [moved(f"d{i}", {"stem.w": 0.1 * (i + 1)}) for i in range(4)]
    far = moved("far", {"stem.w": -1e6})
    *kept, clipped = UpdateBound(3.0).apply(Merged(START), [*others, far])
    assert [u.state["stem.w"].tolist() for u in kept] == [
        u.state["stem.w"].tolist() for u in others
    ]
    want = START["stem.w"] - 3 * 0.3  # the median of 0.1, 0.2, 0.3, 0.4 and 1e6
    np.testing.assert_allclose(clipped.state["stem.w"], want, rtol=1e-5)
    assert clipped.samples == far.samples


@settings(max_examples=50, deadline=None)
@given(
    scales=st.lists(st.floats(0.35, 1.0), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
)
def test_updates_of_similar_length_stay_bit_for_bit(scales: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    updates = []
    for i, scale in enumerate(scales):
        state = {}
        for name, tensor in START.items():
            direction = rng.standard_normal(tensor.shape)
            step = scale * direction / np.sqrt(np.mean(direction**2))
            state[name] = (tensor + step).astype(np.float32)
        updates.append(DeviceUpdate(f"d{i}", state, 1.0))
    bounded = UpdateBound(3.0).apply(Merged(START), updates)
    for before, after in zip(updates, bounded, strict=True):
        for name, tensor in before.state.items():
            np.testing.assert_array_equal(after.state[name], tensor)


def test_layers_are_bounded_one_by_one() -> None:
    """Devices with deeper cuts hold more layers, so a length over all layers compares nothing."""
    updates = [moved(f"d{i}", {"stem.w": 0.1, "block.0.w": 0.1}) for i in range(4)]
    far = moved("far", {"stem.w": 9.0, "block.0.w": 0.2})
    bounded = UpdateBound(3.0).apply(Merged(START), [*updates, far])
    assert distances(bounded, "stem.w")[-1] == pytest.approx(0.3, rel=1e-5)
    assert distances(bounded, "block.0.w")[-1] == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("honest", [1, 2, 3])
def test_with_few_devices_earlier_rounds_have_a_say(honest: int) -> None:
    bound = UpdateBound(1.5)
    for _ in range(3):
        bound.apply(Merged(START), [moved(f"d{i}", {"stem.w": 0.1}) for i in range(honest)])
    alone = bound.apply(Merged(START), [moved("new", {"stem.w": 1e6})])
    assert distances(alone, "stem.w") == pytest.approx([0.6], rel=1e-5)


def test_two_devices_bound_each_other_in_the_first_round() -> None:
    bounded = UpdateBound(1.5).apply(
        Merged(START), [moved("a", {"stem.w": 0.1}), moved("b", {"stem.w": 1e30})]
    )
    assert distances(bounded, "stem.w") == pytest.approx([0.1, 0.6], rel=1e-5)


def test_a_layer_with_few_copies_is_shortened_as_much_as_the_rest_of_its_update() -> None:
    """Heads have the copies of one tier alone; an attacker's other layers give it away."""
    start = {**START, "aux.1.w": np.zeros(3, np.float32), "square/aux.1.w": np.ones(3, np.float32)}
    updates = []
    for i in range(6):
        state = {"stem.w": START["stem.w"] + np.float32(0.1 if i else 10.0)}
        if i < 2:  # the attacker's tier
            by = 0.2 if i else 20.0
            state["aux.1.w"] = np.array([by, -by, by], np.float32)
            state["square/aux.1.w"] = np.full(3, 1 + 0.01 * by**2, np.float32)
        updates.append(DeviceUpdate(f"d{i}", state, 10))
    clipped, *others = UpdateBound(1.5).apply(Merged(start), updates)
    # the stem goes from 100 times the median to 1.5 times: so does the head
    np.testing.assert_allclose(clipped.state["stem.w"], START["stem.w"] + 0.15, rtol=1e-5)
    np.testing.assert_allclose(clipped.state["aux.1.w"], [0.3, -0.3, 0.3], rtol=1e-5)
    want = 1 + 0.01 * 20.0**2 * (0.15 / 10) ** 2
    np.testing.assert_allclose(clipped.state["square/aux.1.w"], want, rtol=1e-5)
    for before, after in zip(updates[1:], others, strict=True):
        for name, tensor in before.state.items():
            np.testing.assert_array_equal(after.state[name], tensor)


def test_a_device_is_bounded_by_its_own_history() -> None:
    bound = UpdateBound(3.0)
    others = [moved(f"d{i}", {"stem.w": 1.0}) for i in range(6)]
    for _ in range(3):
        bound.apply(Merged(START), [*others, moved("small", {"stem.w": 0.1})])
    bounded = bound.apply(Merged(START), [*others, moved("small", {"stem.w": 2.5})])
    assert distances(bounded, "stem.w")[-1] == pytest.approx(0.9, rel=1e-5)


def test_slots_are_bounded_apart_from_parameters() -> None:
    start = {**START, "square/stem.w": np.ones(2, np.float32)}
    far = {"stem.w": START["stem.w"] + np.float32(0.1), "square/stem.w": np.full(2, 1e9, "f4")}
    usual = {"stem.w": START["stem.w"] + np.float32(0.1), "square/stem.w": np.full(2, 1.5, "f4")}
    updates = [DeviceUpdate(f"d{i}", usual, 1) for i in range(4)] + [DeviceUpdate("far", far, 1)]
    clipped = UpdateBound(3.0).apply(Merged(start), updates)[-1].state
    np.testing.assert_array_equal(clipped["stem.w"], far["stem.w"])
    np.testing.assert_allclose(clipped["square/stem.w"], 1 + 9 * 0.5, rtol=1e-5)


def test_nested_widths_are_compared_by_element() -> None:
    """A narrow device holds the leading part of a tensor; its length is smaller for that alone."""
    start = {"head.w": np.zeros((8, 8), np.float32)}
    widths = [2, 2, 2, 8, 8]
    states: list[dict[str, Array]] = [{"head.w": np.full((w, w), 0.1, "f4")} for w in widths]
    updates = [DeviceUpdate(f"d{i}", state, 1) for i, state in enumerate(states)]
    bounded = UpdateBound(1.5).apply(Nested(start), updates)
    for before, after in zip(updates, bounded, strict=True):
        np.testing.assert_array_equal(after.state["head.w"], before.state["head.w"])


def test_base_networks_are_bounded_apart() -> None:
    start = {"head.w": np.stack([np.zeros(2, np.float32), np.full(2, 5.0, np.float32)])}
    updates = [
        DeviceUpdate(
            f"d{i}",
            {"base.0.head.w": np.full(2, 0.1, "f4"), "base.1.head.w": np.full(2, 5.2, "f4")},
            1,
        )
        for i in range(5)
    ]
    updates[0].state["base.1.head.w"][:] = -1e6
    clipped = UpdateBound(3.0).apply(PerBase(start), updates)[0].state
    np.testing.assert_array_equal(clipped["base.0.head.w"], updates[1].state["base.0.head.w"])
    np.testing.assert_allclose(clipped["base.1.head.w"], 5 - 3 * 0.2, rtol=1e-5)


def test_what_is_remembered_goes_through_json() -> None:
    one, other = UpdateBound(3.0), UpdateBound(3.0)
    one.apply(Merged(START), [moved("a", {"stem.w": 0.1})])
    other.restore(json.loads(json.dumps(one.state())))
    far = [moved("b", {"stem.w": 7.0})]
    want = one.apply(Merged(START), far)[0].state["stem.w"]
    np.testing.assert_array_equal(other.apply(Merged(START), far)[0].state["stem.w"], want)


def test_without_a_bound_updates_are_taken_as_they_are() -> None:
    updates = [moved("a", {"stem.w": 0.1}), moved("b", {"stem.w": 1e9})]
    assert UpdateBound(math.inf).apply(Merged(START), updates) == updates


def test_a_method_averages_clipped_updates_and_leaves_out_a_trunk_that_is_not_finite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    method = fedsplitx(START, JobOutline(1))
    updates = [moved(f"d{i}", {"stem.w": 0.1}) for i in range(4)] + [moved("f", {"stem.w": 1e30})]
    bad = TrunkCopy("shared", "block.0", {"block.0.w": np.full((2, 2), np.nan, np.float32)}, 50)
    method.average(updates, [bad])
    after = method.aggregation.trunk_state()
    np.testing.assert_allclose(after["stem.w"], START["stem.w"] + (4 * 0.1 + 0.15) / 5, rtol=1e-5)
    np.testing.assert_array_equal(after["block.0.w"], START["block.0.w"])
    assert "block.0 is left out" in caplog.text
