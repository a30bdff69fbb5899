"""Aggregation and composition of methods, against calculation by hand."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import Array, State, TensorSpec
from export.cutting.split_model import SplitModel
from export.tensor_names import layer_of
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.layer_store import NotFinite
from server_hub.aggregation.merged import Merged
from server_hub.aggregation.separate import Separate
from server_hub.methods.fedsplitx import fedsplitx, fedsplitx_paper
from server_hub.methods.fleet import JobOutline, arrays
from server_hub.methods.method import CopyPerDevice, SharedCopy, Stage
from server_hub.methods.registry import simulated_methods
from server_hub.methods.settings import learning_rate_factor
from server_hub.trunk.interface import TrunkCopy
from tests.lib.trunk_models import dense_model, state_of

MODEL = dense_model(heads=(1, 3))
LAYERS = ["stem", "block.0", "block.1", "block.2", "block.3", "aux.1", "aux.3", "head"]


def filled(layers: Iterable[str], value: float) -> State:
    """Return tensors of some layers, with the same value in every element."""
    wanted = set(layers)
    return {
        name: np.full_like(tensor, value)
        for name, tensor in state_of(MODEL).items()
        if layer_of(name) in wanted
    }


def initial() -> State:
    """Return an initial state in which every element is 100."""
    return filled(LAYERS, 100.0)


def specs(layers: Iterable[str]) -> list[TensorSpec]:
    """Return the tensors that devices with these layers exchange."""
    return [TensorSpec(n, "float32", t.shape) for n, t in filled(layers, 0.0).items()]


def update(device: str, cut: int, value: float, samples: int) -> DeviceUpdate:
    """Return the update of a device with a cut."""
    return DeviceUpdate(device, filled(MODEL.client_layers(cut), value), samples)


def trunk_copy(layer: str, value: float, samples: int, replica: str = "shared") -> TrunkCopy:
    """Return a copy from the trunk."""
    return TrunkCopy(replica, layer, filled([layer], value), samples)


def values(state: State) -> dict[str, float]:
    """Return the value of each layer; all its elements must be equal."""
    found: dict[str, set[float]] = {}
    for name, tensor in state.items():
        assert tensor.dtype == np.float32
        found.setdefault(layer_of(name), set()).update(np.unique(tensor).tolist())
    assert all(len(one) == 1 for one in found.values()), found
    return {layer: one.pop() for layer, one in found.items()}


# A small device (cut 1, 10 samples), a large one (cut 3, 30 samples), and a trunk with the rows
# of both: 10 from block 1 on, 40 from block 3 on.
UPDATES = [update("small", 1, 1.0, 10), update("large", 3, 5.0, 30)]
COPIES = [
    trunk_copy("block.1", 9.0, 10),
    trunk_copy("block.2", 9.0, 10),
    trunk_copy("aux.3", 9.0, 10),
    trunk_copy("block.3", 9.0, 40),
    trunk_copy("head", 9.0, 40),
]


# --- merged ---------------------------------------------------------------------------------------


def test_merged_weighs_copies_by_samples_wherever_they_were_trained() -> None:
    merged = Merged(initial())
    merged.commit(UPDATES, COPIES)
    shared = (10 * 1.0 + 30 * 5.0) / 40
    met = (30 * 5.0 + 10 * 9.0) / 40
    assert values(merged.trunk_state()) == {
        "stem": shared,
        "block.0": shared,
        "aux.1": shared,
        "block.1": met,
        "block.2": met,
        "aux.3": met,
        "block.3": 9.0,
        "head": 9.0,
    }
    entries = merged.store.entries
    assert entries["block.1"].trained_by == ["large", "trunk/shared"]
    assert entries["stem"].trained_by == ["small", "large"]
    assert entries["head"].trained_by == ["trunk/shared"]


def test_merged_leaves_layers_that_nobody_trained() -> None:
    merged = Merged(initial())
    merged.commit([update("small", 1, 1.0, 10)], [trunk_copy("head", 9.0, 10)])
    assert values(merged.trunk_state()) == {
        **dict.fromkeys(LAYERS, 100.0),
        **dict.fromkeys(["stem", "block.0", "aux.1"], 1.0),
        "head": 9.0,
    }


def test_merged_ignores_copies_that_no_row_went_through() -> None:
    merged = Merged(initial())
    merged.commit([update("small", 1, 1.0, 10)], [trunk_copy("block.0", 9.0, 0)])
    assert values(merged.device_state(specs(["block.0"]))) == {"block.0": 1.0}


def test_merged_devices_and_trunk_see_the_same_layers() -> None:
    merged = Merged(initial())
    merged.commit(UPDATES, COPIES)
    everything = values(merged.trunk_state())
    for cut in (1, 2, 3):
        layers = MODEL.client_layers(cut)
        assert values(merged.device_state(specs(layers))) == {n: everything[n] for n in layers}
        assert merged.path_state(MODEL, cut) is merged.trunk_state(), "one model serves all cuts"


def test_merged_hands_out_a_new_state_after_each_commit() -> None:
    merged = Merged(initial())
    before = merged.trunk_state()
    merged.commit(UPDATES, COPIES)
    assert set(values(before).values()) == {100.0}
    assert values(merged.trunk_state())["head"] == 9.0
    assert merged.trunk_state() is merged.trunk_state()


def test_merged_changes_nothing_where_a_copy_is_not_finite() -> None:
    merged = Merged(initial())
    with pytest.raises(NotFinite):
        merged.commit(UPDATES, [*COPIES[:-1], trunk_copy("head", math.nan, 40)])
    assert set(values(merged.trunk_state()).values()) == {100.0}


# --- separate -------------------------------------------------------------------------------------

REPLICAS = [
    trunk_copy("block.1", 20.0, 10, "small"),
    trunk_copy("block.2", 20.0, 10, "small"),
    trunk_copy("aux.3", 20.0, 10, "small"),
    trunk_copy("block.3", 20.0, 10, "small"),
    trunk_copy("head", 20.0, 10, "small"),
    trunk_copy("block.3", 50.0, 30, "large"),
    trunk_copy("head", 50.0, 30, "large"),
]


def test_separate_takes_plain_means_and_never_mixes_devices_with_trunk() -> None:
    separate = Separate(initial())
    separate.commit(UPDATES, REPLICAS)
    assert values(separate.device_state(specs(LAYERS))) == {
        "stem": 3.0,
        "block.0": 3.0,
        "aux.1": 3.0,
        "block.1": 5.0,
        "block.2": 5.0,
        "aux.3": 5.0,
        "block.3": 100.0,
        "head": 100.0,
    }
    assert values(separate.trunk_state()) == {
        "stem": 3.0,  # only devices train it, and heads on the hub may read it
        "block.0": 100.0,
        "aux.1": 100.0,
        "block.1": 20.0,
        "block.2": 20.0,
        "aux.3": 20.0,
        "block.3": 35.0,
        "head": 35.0,
    }
    assert separate.trunk.entries["head"].trained_by == ["trunk/small", "trunk/large"]


def test_separate_states_are_those_of_their_own_store() -> None:
    separate = Separate(initial())
    separate.commit(UPDATES, [])
    states = values(separate.trunk_state())
    assert states.pop("stem") == 3.0
    assert set(states.values()) == {100.0}
    separate = Separate(initial())
    separate.commit([], REPLICAS)
    assert set(values(separate.device_state(specs(LAYERS))).values()) == {100.0}
    assert values(separate.device_state(specs(["stem", "aux.1"]))).keys() == {"stem", "aux.1"}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_separate_path_is_the_devices_layers_and_above_them_the_trunks(cut: int) -> None:
    separate = Separate(initial())
    separate.commit(UPDATES, REPLICAS)
    path = values(separate.path_state(MODEL, cut))
    devices, trunk = values(separate.device_state(specs(LAYERS))), values(separate.trunk_state())
    own = set(MODEL.client_layers(cut))
    assert path == {layer: devices[layer] if layer in own else trunk[layer] for layer in LAYERS}
    assert separate.path_state(MODEL, cut).keys() == initial().keys()


# --- compositions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("local_epochs", [1, 5])
def test_the_merged_form(local_epochs: int) -> None:
    method = fedsplitx(initial(), JobOutline(9, local_epochs))
    assert method.stage(1, 9) == method.stage(9, 9) == Stage(ActivationMode.TRAIN)
    assert isinstance(method.copies, SharedCopy)
    assert {method.copies.replica_of(device) for device in ("a", "b")} == {"shared"}
    assert isinstance(method.aggregation, Merged)
    assert values(method.aggregation.trunk_state()) == dict.fromkeys(LAYERS, 100.0)
    assert fedsplitx(initial(), JobOutline(9)).name == method.name


@pytest.mark.parametrize("local_epochs", [1, 5])
def test_the_papers_form(local_epochs: int) -> None:
    method = fedsplitx_paper(initial(), JobOutline(9, local_epochs))
    wanted = Stage(ActivationMode.FORWARD, trunk_epochs=local_epochs)
    assert method.stage(1, 9) == method.stage(9, 9) == wanted
    assert isinstance(method.copies, CopyPerDevice)
    assert [method.copies.replica_of(device) for device in ("a", "b", "a")] == ["a", "b", "a"]
    assert isinstance(method.aggregation, Separate)
    assert values(method.aggregation.trunk_state()) == dict.fromkeys(LAYERS, 100.0)
    assert values(method.aggregation.device_state(specs(["stem"]))) == {"stem": 100.0}
    assert method.name != fedsplitx(initial(), JobOutline(9)).name


def test_a_method_does_not_share_memory_with_the_initial_state() -> None:
    for make in (fedsplitx, fedsplitx_paper):
        start: dict[str, Array] = initial()
        method = make(start, JobOutline(9))
        for tensor in start.values():
            tensor[...] = 7
        assert set(values(method.aggregation.trunk_state()).values()) == {100.0}


def test_a_bundle_without_the_graphs_of_a_method_is_refused(
    bundles: BundleIndex, model: SplitModel
) -> None:
    """The sentence says what to write into ``tiers.toml``; recipes ask exports for the same."""
    manifests = {name: bundles.manifest(name) for name in sorted(bundles.tiers)}
    for recipe in simulated_methods().values():
        method = replace(fedsplitx(arrays(model.trained()), JobOutline(9)), name=recipe.title)
        modes = {
            "backward": ActivationMode.RETURNED,
            "finish": ActivationMode.U_SHAPED,
            "fuse": ActivationMode.FUSED,
        }
        if not recipe.graphs:
            method.check_bundles(manifests, model, [ActivationMode.TRAIN])
            continue
        said = (
            f"{recipe.title} needs the graph {recipe.graphs[0]!r}, and the bundle of "
            f"{min(manifests)!r} lacks it; export with graphs = {json.dumps(recipe.graphs)} in "
            "tiers.toml"
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
            method.check_bundles(manifests, model, [modes[recipe.graphs[-1]]])


# --- learning rate --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_constant_rate_stays(count: int) -> None:
    assert {learning_rate_factor("constant", n, count) for n in range(1, count + 1)} == {1.0}


def test_the_cosine_goes_from_one_towards_zero_and_never_reaches_it() -> None:
    factors = [learning_rate_factor("cosine", number, 20) for number in range(1, 21)]
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(0.5)
    assert factors[5] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert all(a > b for a, b in itertools.pairwise(factors))
    assert 0 < factors[-1] < 0.01
    assert learning_rate_factor("cosine", 1, 1) == 1.0


def test_the_steps_are_a_tenth_at_half_and_a_hundredth_at_three_quarters() -> None:
    factors = [learning_rate_factor("step", number, 20) for number in range(1, 21)]
    assert factors == [1.0] * 10 + [0.1] * 5 + [0.01] * 5
    assert [learning_rate_factor("step", number, 4) for number in (1, 2, 3, 4)] == [
        1.0, 1.0, 0.1, 0.01
    ]  # fmt: skip
    assert learning_rate_factor("step", 1, 1) == 1.0
