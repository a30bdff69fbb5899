"""What holds the global model and averages into it what devices and trunk have trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_sdk.protocol.tensors import TensorSpec
from export.split import SplitModel
from server_hub.aggregation.layer_store import State
from server_hub.trunk.interface import TrunkCopy


@dataclass(frozen=True)
class DeviceUpdate:
    """What a device has trained in a round, and how it says that it went."""

    device: str
    state: State
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


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
