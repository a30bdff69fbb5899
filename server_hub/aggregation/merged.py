"""Aggregation with one store for devices and trunk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from edge_sdk.protocol.tensors import State, TensorSpec
from export.cutting.split_model import SplitModel
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.layer_store import LayerCopy, LayerStore, split_by_layer
from server_hub.aggregation.robust import RuleName, rule_of
from server_hub.trunk.interface import TrunkCopy


class Merged:
    """One store: every layer is the mean of all its copies, from devices and from the trunk.

    The weight of a copy is the number of samples that it was trained on.

    Args:
        initial: initial trained tensors by name.
        rule: name of the rule that averages the copies of a layer.
    """

    def __init__(self, initial: State, rule: RuleName = "mean") -> None:
        self.order: list[int] = []
        self.store = LayerStore(initial, rule_of(rule))
        self._everything: State | None = None

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        everything = self.trunk_state()
        return {spec.name: everything[spec.name] for spec in specs}

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        if self._everything is None:
            self._everything = self.store.state()
        return self._everything

    def path_state(self, model: SplitModel, cut: int) -> State:
        return self.trunk_state()  # one object for all cuts, so that one model serves all

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        trained = [c for u in updates for c in _layer_copies(u, weight=u.samples)]
        self.store.commit([*trained, *of_trunk(copies)], of_trunk(copies, parts=True))
        self._everything = None

    def models(self, model: SplitModel, cuts: Mapping[str, int]) -> dict[str | None, State]:
        return {None: self.path_state(model, model.depth)}

    def stores(self) -> Mapping[str, State]:
        return {"all": self.trunk_state()}

    def restore(self, stores: Mapping[str, State]) -> None:
        self.store.restore(stores["all"])
        self._everything = None


def of_trunk(
    copies: Sequence[TrunkCopy], *, parts: bool = False, weight: float | None = None
) -> list[LayerCopy]:
    """Return what the trunk has trained, as copies of layers.

    Args:
        copies: layers, and parts of tied tensors, that the trunk has trained.
        parts: whether to return the parts instead of the layers.
        weight: weight of each copy; None for the number of samples.
    """
    return [
        LayerCopy(c.layer, c.tensors, c.samples if weight is None else weight, f"trunk/{c.replica}")
        for c in copies
        if c.part is parts
    ]


def _layer_copies(update: DeviceUpdate, weight: float) -> list[LayerCopy]:
    """Return the layers of an update as copies with this weight."""
    return [
        LayerCopy(layer, tensors, weight, update.device)
        for layer, tensors in split_by_layer(update.state).items()
    ]
