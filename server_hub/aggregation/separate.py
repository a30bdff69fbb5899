"""Aggregation with one store for devices and one for the trunk (FedSplitX, arXiv 2310.14579)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from edge_sdk.protocol.tensors import State, TensorSpec
from export.cutting.split_model import SplitModel
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.layer_store import LayerStore
from server_hub.aggregation.merged import _layer_copies, of_trunk
from server_hub.trunk.interface import TrunkCopy


class Separate:
    """Two separate stores with unweighted means, as in the paper of FedSplitX (arXiv 2310.14579).

    One store averages the updates of devices. The other averages the copies of the trunk. The stem
    is that of the devices' store. A tensor that is tied to it is one tensor, of which both sides
    have a part of the gradient, so there the stores meet.

    Args:
        initial: initial trained tensors by name.
    """

    def __init__(self, initial: State) -> None:
        self.order: list[int] = []
        self.devices = LayerStore(initial)
        self.trunk = LayerStore(initial)

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        everything = self.devices.state()
        return {spec.name: everything[spec.name] for spec in specs}

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        return {**self.trunk.state(), **self.devices.state(["stem"])}

    def path_state(self, model: SplitModel, cut: int) -> State:
        return {**self.trunk.state(), **self.devices.state(model.client_layers(cut))}

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        self.devices.commit(
            [c for u in updates for c in _layer_copies(u, weight=1.0)],
            of_trunk(copies, parts=True, weight=1.0),
        )
        self.trunk.commit(of_trunk(copies, weight=1.0))

    def models(self, model: SplitModel, cuts: Mapping[str, int]) -> dict[str | None, State]:
        return {tier: self.path_state(model, cut) for tier, cut in cuts.items()}

    def stores(self) -> Mapping[str, State]:
        return {"devices": self.devices.state(), "trunk": self.trunk.state()}

    def restore(self, stores: Mapping[str, State]) -> None:
        self.devices.restore(stores["devices"])
        self.trunk.restore(stores["trunk"])
