"""LayerStore: means of layers against a closed form, and commits that are all or nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.protocol.tensors import Array
from server_hub.aggregation.layer_store import (
    LayerCopy,
    LayerStore,
    NotFinite,
    check_finite,
    split_by_layer,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "stem.weight": (3, 2),
    "block.0.weight": (2, 2),
    "block.0.norm.bias": (2,),
    "block.10.weight": (2, 3),
    "aux.1.out.weight": (4,),
    "head.bias": (),
}
LAYERS = ["stem", "block.0", "block.10", "aux.1", "head"]


def state(seed: int, scale: float = 1.0) -> dict[str, Array]:
    """Return random tensors for every name."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * rng.standard_normal(shape), np.float32)
        for name, shape in SHAPES.items()
    }


def copy_of(layer: str, seed: int, weight: float, scale: float = 1.0) -> LayerCopy:
    """Return a random copy of a layer."""
    return LayerCopy(layer, split_by_layer(state(seed, scale))[layer], weight, f"by-{seed}")


def snapshot(store: LayerStore) -> dict[str, tuple[int, list[str], dict[str, Array]]]:
    """Return the whole contents of a store."""
    return {
        layer: (e.version, list(e.trained_by), {n: t.copy() for n, t in e.tensors.items()})
        for layer, e in store.entries.items()
    }


def assert_unchanged(
    store: LayerStore, before: dict[str, tuple[int, list[str], dict[str, Array]]]
) -> None:
    """Check that the store is unchanged, bit for bit."""
    after = snapshot(store)
    assert after.keys() == before.keys()
    for layer, (version, trained_by, tensors) in before.items():
        assert after[layer][:2] == (version, trained_by)
        assert after[layer][2].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(after[layer][2][name], tensor, err_msg=name)


COPIES = st.lists(
    st.builds(
        copy_of,
        layer=st.sampled_from(LAYERS),
        seed=st.integers(0, 10_000),
        weight=st.one_of(st.just(0.0), st.integers(1, 5000).map(float), st.floats(1e-3, 1e6)),
        scale=st.sampled_from([1e-6, 1.0, 1e6]),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(COPIES)
def test_a_commit_is_the_weighted_mean_of_each_layer(copies: list[LayerCopy]) -> None:
    store = LayerStore(state(0))
    store.commit(copies)
    for layer, initial in split_by_layer(state(0)).items():
        mine = [copy for copy in copies if copy.layer == layer and copy.weight > 0]
        entry = store.entries[layer]
        assert entry.version == (1 if mine else 0)
        assert entry.trained_by == [copy.source for copy in mine]
        for name, old in initial.items():
            new = entry.tensors[name]
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            if not mine:
                np.testing.assert_array_equal(new, old)
                continue
            stacked = np.stack([copy.tensors[name].astype(np.float64) for copy in mine])
            weights = np.array([copy.weight for copy in mine])
            want = np.tensordot(weights, stacked, 1) / math.fsum(weights)
            largest = float(np.abs(stacked).max())
            np.testing.assert_allclose(new, want, rtol=2**-23, atol=1e-12 * largest)
            assert (new <= stacked.max(0) + 1e-7 * largest).all()
            assert (new >= stacked.min(0) - 1e-7 * largest).all()


@settings(max_examples=80, deadline=None)
@given(COPIES, st.randoms(use_true_random=False))
def test_the_order_of_copies_matters_for_rounding_alone(
    copies: list[LayerCopy], rng: Random
) -> None:
    shuffled = list(copies)
    rng.shuffle(shuffled)
    one, other = LayerStore(state(0)), LayerStore(state(0))
    one.commit(copies)
    other.commit(shuffled)
    largest = max((float(np.abs(t).max()) for c in copies for t in c.tensors.values()), default=1)
    for name, tensor in one.state().items():
        np.testing.assert_allclose(
            other.state()[name], tensor, rtol=2**-22, atol=1e-12 * largest, err_msg=name
        )


def test_equal_copies_leave_exactly_their_value() -> None:
    store = LayerStore(state(0))
    store.commit([copy_of("block.0", 3, weight) for weight in (0.1, 0.7, 1e5, 3)])
    for name, tensor in copy_of("block.0", 3, 1).tensors.items():
        np.testing.assert_array_equal(store.entries["block.0"].tensors[name], tensor)


def test_large_values_do_not_overflow_in_the_mean() -> None:
    store = LayerStore({"head.w": np.zeros(2, np.float32)})
    largest = np.finfo(np.float32).max
    value = np.array([largest, -largest], np.float32)
    store.commit([LayerCopy("head", {"head.w": value}, weight, "d") for weight in (3, 7, 11)])
    np.testing.assert_array_equal(store.state()["head.w"], value)


def test_versions_count_commits_of_the_layer() -> None:
    store = LayerStore(state(0))
    assert {e.version for e in store.entries.values()} == {0}
    assert all(e.trained_by == [] for e in store.entries.values())
    store.commit([copy_of("stem", 1, 2), copy_of("stem", 2, 3), copy_of("head", 3, 1)])
    store.commit([copy_of("head", 4, 1)])
    store.commit([])
    versions = {layer: e.version for layer, e in store.entries.items()}
    assert versions == {"stem": 1, "block.0": 0, "block.10": 0, "aux.1": 0, "head": 2}
    assert store.entries["stem"].trained_by == ["by-1", "by-2"]
    assert store.entries["head"].trained_by == ["by-4"], "only the present version's"


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_copies_without_weight_are_ignored(weight: float) -> None:
    store, reference = LayerStore(state(0)), LayerStore(state(0))
    bad = LayerCopy("stem", {"stem.weight": np.full((3, 2), np.nan, np.float32)}, weight, "bad")
    store.commit([bad, copy_of("stem", 1, 2), copy_of("head", 2, weight)])
    reference.commit([copy_of("stem", 1, 2)])
    assert_unchanged(store, snapshot(reference))
    before = snapshot(store)
    store.commit([bad])
    assert_unchanged(store, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_copy_that_is_not_finite_changes_nothing_at_all(value: float, position: int) -> None:
    store = LayerStore(state(0))
    store.commit([copy_of("stem", 1, 2)])
    before = snapshot(store)
    bad = copy_of("block.0", 5, 1)
    tensor = bad.tensors["block.0.norm.bias"]
    tensor[-1] = value
    copies: Sequence[LayerCopy] = [copy_of("stem", 2, 2), copy_of("block.0", 3, 4),
                                   copy_of("head", 4, 1)]  # fmt: skip
    with pytest.raises(NotFinite, match=r"block\.0\.norm\.bias") as caught:
        store.commit([*copies[:position], bad, *copies[position:]])
    assert caught.value.tensor == "block.0.norm.bias"
    assert_unchanged(store, before)
    store.commit(copies)
    assert store.entries["block.0"].trained_by == ["by-3"]


@pytest.mark.parametrize(
    "broken",
    [
        LayerCopy("nowhere", {"nowhere.w": np.zeros(1, np.float32)}, 1.0, "d"),
        LayerCopy("head", {}, 1.0, "d"),
    ],
    ids=["unknown layer", "missing tensor"],
)
def test_a_copy_that_does_not_fit_changes_nothing_at_all(broken: LayerCopy) -> None:
    """Callers check copies first; if they fail to, the model is still intact."""
    store = LayerStore(state(0))
    before = snapshot(store)
    with pytest.raises(KeyError):
        store.commit([copy_of("stem", 1, 2), broken])
    assert_unchanged(store, before)


def test_a_commit_takes_any_iterable_once() -> None:
    store, reference = LayerStore(state(0)), LayerStore(state(0))
    copies = [copy_of("stem", 1, 2), copy_of("head", 2, 3)]
    store.commit(copy for copy in copies)
    reference.commit(copies)
    assert_unchanged(store, snapshot(reference))


def test_the_store_does_not_share_memory_with_its_initial_state() -> None:
    initial = state(0)
    store = LayerStore(initial)
    initial["stem.weight"][...] = 7
    np.testing.assert_array_equal(store.state()["stem.weight"], state(0)["stem.weight"])


def test_a_state_that_was_handed_out_stays_as_it_is() -> None:
    store = LayerStore(state(0))
    handed_out = store.state()
    kept = {name: tensor.copy() for name, tensor in handed_out.items()}
    store.commit([copy_of(layer, 1, 1) for layer in LAYERS])
    for name, tensor in kept.items():
        np.testing.assert_array_equal(handed_out[name], tensor)
        assert not np.array_equal(store.state()[name], tensor)


def test_the_state_of_some_layers_holds_their_tensors_alone() -> None:
    store = LayerStore(state(0))
    assert store.state(["block.0", "head"]).keys() == {
        "block.0.weight", "block.0.norm.bias", "head.bias"
    }  # fmt: skip
    assert store.state([]) == {}
    assert store.state().keys() == SHAPES.keys()


def test_tensors_are_grouped_by_layer() -> None:
    groups = {layer: set(tensors) for layer, tensors in split_by_layer(state(0)).items()}
    assert groups == {
        "stem": {"stem.weight"},
        "block.0": {"block.0.weight", "block.0.norm.bias"},
        "block.10": {"block.10.weight"},
        "aux.1": {"aux.1.out.weight"},
        "head": {"head.bias"},
    }


def test_check_finite_looks_at_floats_of_every_width() -> None:
    fine = {"a": np.zeros(3, np.float32), "b": np.array([1, 2], np.int64)}
    check_finite(fine)
    for dtype in (np.float16, np.float32, np.float64):
        with pytest.raises(NotFinite) as caught:
            check_finite({**fine, "c": np.array([0, np.inf], dtype)})
        assert caught.value.tensor == "c"
