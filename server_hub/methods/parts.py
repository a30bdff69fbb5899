"""The parts that training methods are composed of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from edge_sdk.protocol.tensors import Array, TensorSpec
from export.split import SplitModel
from server_hub.layers import LayerCopy, LayerStore, State, split_by_layer
from server_hub.methods.mixing import Mixing
from server_hub.trunk import TrunkCopy


@dataclass(frozen=True)
class DeviceUpdate:
    """What a device has trained in a round, and how it says that it went."""

    device: str
    state: State
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


# --- what crosses the cut -------------------------------------------------------------------------

ActivationMode = Literal["train", "forward", "returned", "u_shaped", "fused", "none"]
"""When a device sends activations: from its training steps, from a pass before training, never.

No gradient comes back in these: a device learns from its auxiliary heads alone. With ``returned``
it sends each batch, gets the gradient of its activations, and learns from that alone; with
``fused`` from both. With ``u_shaped`` labels stay on the device, and the model's head is there.
"""

RETURNING = ("returned", "u_shaped", "fused")
"""Those in which gradients come back."""


# --- copies of the trunk --------------------------------------------------------------------------


class ServerCopies(Protocol):
    """Which copy of the trunk a device's activations train."""

    def replica_of(self, device: str) -> str:
        """Name of the copy."""


class SharedCopy:
    """One trunk for all devices: their rows are merged into one batch."""

    def replica_of(self, device: str) -> str:
        return "shared"


class CopyPerDevice:
    """One trunk per device, all starting the round from the same weights."""

    def replica_of(self, device: str) -> str:
        return device


# --- aggregation ----------------------------------------------------------------------------------


class Aggregation(Protocol):
    """Holds the global model and averages into it what was trained."""

    def device_state(self, specs: Sequence[TensorSpec]) -> State:
        """What a device that holds these tensors starts from."""

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        """What the trunk starts from, where activations enter at ``cuts``."""

    def path_state(self, model: SplitModel, cut: int) -> State:
        """The whole model as an input meets it that enters on a device with this cut."""

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average what was trained into the global model."""

    def stores(self) -> Mapping[str, State]:
        """The stores' tensors, by the store's name: all that there is to save."""

    def restore(self, stores: Mapping[str, State]) -> None:
        """Go back to what :meth:`stores` has given."""


class Merged:
    """One store: every layer is the mean of all its copies, wherever they were trained.

    A copy counts by the samples that it was trained on.
    """

    def __init__(self, initial: State) -> None:
        self.store = LayerStore(initial)
        self._everything: State | None = None

    def device_state(self, specs: Sequence[TensorSpec]) -> State:
        everything = self.trunk_state()
        return {spec.name: everything[spec.name] for spec in specs}

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        if self._everything is None:
            self._everything = self.store.state()
        return self._everything

    def path_state(self, model: SplitModel, cut: int) -> State:
        return self.trunk_state()  # one object for all cuts, so that one model serves them

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        self.store.commit(
            [
                *(c for u in updates for c in _layer_copies(u, weight=u.samples)),
                *(LayerCopy(c.layer, c.tensors, c.samples, f"trunk/{c.replica}") for c in copies),
            ]
        )
        self._everything = None

    def stores(self) -> Mapping[str, State]:
        return {"all": self.trunk_state()}

    def restore(self, stores: Mapping[str, State]) -> None:
        self.store.restore(stores["all"])
        self._everything = None


class Nested(Merged):
    """One store for models of several widths: a device holds the leading part of each tensor.

    An element is the mean over the copies that hold it (HeteroFL, arXiv 2010.01264; FjORD,
    arXiv 2102.13451), weighted by samples. There is no trunk.
    """

    def device_state(self, specs: Sequence[TensorSpec]) -> State:
        everything = self.trunk_state()
        return {
            spec.name: np.ascontiguousarray(everything[spec.name][leading(spec.shape)])
            for spec in specs
        }

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average each element over the copies that hold it; the others keep their value."""
        old = self.trunk_state()
        sums: dict[str, tuple[Array, Array]] = {}
        for update in updates:
            for name, tensor in update.state.items():
                total, weight = sums.setdefault(
                    name, (np.zeros(old[name].shape), np.zeros(old[name].shape))
                )
                total[leading(tensor.shape)] += np.multiply(
                    tensor, update.samples, dtype=np.float64
                )
                weight[leading(tensor.shape)] += update.samples
        state = {
            name: np.where(weight > 0, total / np.maximum(weight, 1), old[name])
            for name, (total, weight) in sums.items()
        }
        super().commit([DeviceUpdate("all", state, 1)], [])


def leading(shape: Sequence[int | str]) -> tuple[slice, ...]:
    """Index of the leading part of a larger tensor."""
    return tuple(slice(int(n)) for n in shape)


class Separate:
    """Two stores that never meet, unweighted means: the form of FedSplitX's paper.

    Devices average with devices, the trunk's replicas with each other.
    """

    def __init__(self, initial: State) -> None:
        self.devices = LayerStore(initial)
        self.trunk = LayerStore(initial)

    def device_state(self, specs: Sequence[TensorSpec]) -> State:
        everything = self.devices.state()
        return {spec.name: everything[spec.name] for spec in specs}

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        return self.trunk.state()

    def path_state(self, model: SplitModel, cut: int) -> State:
        return {**self.trunk.state(), **self.devices.state(model.client_layers(cut))}

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        self.devices.commit(c for u in updates for c in _layer_copies(u, weight=1.0))
        self.trunk.commit(LayerCopy(c.layer, c.tensors, 1.0, f"trunk/{c.replica}") for c in copies)

    def stores(self) -> Mapping[str, State]:
        return {"devices": self.devices.state(), "trunk": self.trunk.state()}

    def restore(self, stores: Mapping[str, State]) -> None:
        self.devices.restore(stores["devices"])
        self.trunk.restore(stores["trunk"])


def _layer_copies(update: DeviceUpdate, weight: float) -> list[LayerCopy]:
    return [
        LayerCopy(layer, tensors, weight, update.device)
        for layer, tensors in split_by_layer(update.state).items()
    ]


# --- the composition ------------------------------------------------------------------------------

Path = Literal["device_alone", "through_hub", "ensemble", "mix"]
"""A way to answer: the device's own heads, the model's head on the hub, all heads together; or all
base networks, mixed."""

ALL_PATHS: tuple[Path, ...] = ("device_alone", "through_hub", "ensemble")
"""Those of a single model."""


@dataclass(frozen=True)
class Stage:
    """What happens in a round.

    Attributes:
        activations: what crosses the cut, and when.
        local_epochs: epochs on the devices; None for as many as are configured.
        trunk_epochs: passes of the trunk over the round's activations.
        everyone: all devices that are ready take part, not a draw of them.
        anneal: the trunk's learning rate goes from its full value to zero within the round.
    """

    activations: ActivationMode
    local_epochs: int | None = None
    trunk_epochs: int = 1
    everyone: bool = False
    anneal: bool = False


@dataclass(frozen=True)
class Method:
    """A training method as a composition of parts.

    Attributes:
        name: for reports.
        stage: what happens in round ``number`` of ``count``, from 1 on.
        copies: which copy of the trunk a device's activations train.
        aggregation: the global model and how it averages.
        paths: the ways to answer that it trains.
        merges: whether the trunk merges arrivals into one step; else each is a step of its own.
        keeps_slots: the optimizers' slots are averaged and handed on as the parameters are; else
            every round starts with fresh optimizers.
        mixing: how base networks are trained, where the model is split into some.
    """

    name: str
    stage: Callable[[int, int], Stage]
    copies: ServerCopies
    aggregation: Aggregation
    paths: tuple[Path, ...] = ALL_PATHS
    merges: bool = True
    keeps_slots: bool = False
    mixing: Mixing | None = None


def always(stage: Stage) -> Callable[[int, int], Stage]:
    """The same in every round."""
    return lambda number, count: stage
