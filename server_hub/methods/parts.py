"""The parts that training methods are composed of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from export.split import SplitModel
from server_hub.layers import LayerCopy, LayerStore, State, split_by_layer
from server_hub.trunk import TrunkCopy


@dataclass(frozen=True)
class DeviceUpdate:
    """What a device has trained in a round, and how it says that it went."""

    device: str
    state: State
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


# --- what crosses the cut -------------------------------------------------------------------------

ActivationMode = Literal["train", "forward", "none"]
"""When a device sends activations: from its training steps, from a pass before training, never.

No gradient comes back in any of them: a device learns from its auxiliary heads alone.
"""


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

    def device_state(self, layers: Iterable[str]) -> State:
        """What a device that holds ``layers`` starts from."""

    def trunk_state(self) -> State:
        """What the trunk starts from."""

    def path_state(self, model: SplitModel, cut: int) -> State:
        """The whole model as an input meets it that enters on a device with this cut."""

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average what was trained into the global model."""


class Merged:
    """One store: every layer is the mean of all its copies, wherever they were trained.

    A copy counts by the samples that it was trained on.
    """

    def __init__(self, initial: State) -> None:
        self.store = LayerStore(initial)
        self._everything: State | None = None

    def device_state(self, layers: Iterable[str]) -> State:
        return self.store.state(layers)

    def trunk_state(self) -> State:
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


class Separate:
    """Two stores that never meet, unweighted means: the form of FedSplitX's paper.

    Devices average with devices, the trunk's replicas with each other.
    """

    def __init__(self, initial: State) -> None:
        self.devices = LayerStore(initial)
        self.trunk = LayerStore(initial)

    def device_state(self, layers: Iterable[str]) -> State:
        return self.devices.state(layers)

    def trunk_state(self) -> State:
        return self.trunk.state()

    def path_state(self, model: SplitModel, cut: int) -> State:
        return {**self.trunk.state(), **self.devices.state(model.client_layers(cut))}

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        self.devices.commit(c for u in updates for c in _layer_copies(u, weight=1.0))
        self.trunk.commit(LayerCopy(c.layer, c.tensors, 1.0, f"trunk/{c.replica}") for c in copies)


def _layer_copies(update: DeviceUpdate, weight: float) -> list[LayerCopy]:
    return [
        LayerCopy(layer, tensors, weight, update.device)
        for layer, tensors in split_by_layer(update.state).items()
    ]


# --- the composition ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A training method as a composition of parts.

    Attributes:
        name: for reports.
        activations: what crosses the cut, and when.
        copies: which copy of the trunk a device's activations train.
        aggregation: the global model and how it averages.
        trunk_epochs: passes of the trunk over a round's activations.
    """

    name: str
    activations: ActivationMode
    copies: ServerCopies
    aggregation: Aggregation
    trunk_epochs: int
