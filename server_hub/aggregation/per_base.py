"""Aggregation with a store for each base network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from edge_sdk.bundle.manifest import tensor_of
from edge_sdk.protocol.tensors import State, TensorSpec
from export.cutting.split_model import SplitModel
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.layer_store import (
    LayerCopy,
    LayerStore,
    split_by_layer,
    weighted_mean,
)
from server_hub.aggregation.merged import of_trunk
from server_hub.trunk.interface import TrunkCopy


class BaseStore(LayerStore):
    """The store of a base network.

    A copy may lack tensors that its device has not trained, such as noise norms. A tensor that no
    copy has keeps its value.
    """

    def mean(self, layer: str, copies: Sequence[LayerCopy]) -> State:
        old = self.entries[layer].tensors
        tensors: State = {}
        for name, tensor in old.items():
            having = [copy for copy in copies if name in copy.tensors]
            tensors |= weighted_mean({name: tensor}, having) if having else {name: tensor}
        return tensors


class PerBase:
    """A store for each base network.

    Implements :class:`server_hub.aggregation.interface.Aggregation`.

    Args:
        initial: initial trained tensors by name, each (bases, ...).
    """

    def __init__(self, initial: State) -> None:
        bases = len(next(iter(initial.values())))
        self._stores = [BaseStore({n: t[b] for n, t in initial.items()}) for b in range(bases)]
        self.order = list(range(bases))
        self._stacked: State | None = None

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        everything = self._stores[base].state()
        return {spec.name: everything[spec.name] for spec in specs}

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        if self._stacked is None:
            states = [store.state() for store in self._stores]
            self._stacked = {n: np.stack([state[n] for state in states]) for n in states[0]}
        return self._stacked

    def path_state(self, model: SplitModel, cut: int) -> State:
        return self.trunk_state()  # one object for all cuts, so that one set of models serves all

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        for base, store in enumerate(self._stores):
            first = tensor_of(base, "")
            own = [
                (u, {n.removeprefix(first): t for n, t in u.state.items() if n.startswith(first)})
                for u in updates
            ]
            trained = [
                LayerCopy(layer, tensors, update.samples, update.device)
                for update, state in own
                for layer, tensors in split_by_layer(state).items()
            ]
            deep = [c for c in copies if c.base == base]
            store.commit([*trained, *of_trunk(deep)], of_trunk(deep, parts=True))
        self._stacked = None

    def models(self, model: SplitModel, cuts: Mapping[str, int]) -> dict[str | None, State]:
        return {f"base-{base}": store.state() for base, store in enumerate(self._stores)}

    def stores(self) -> Mapping[str, State]:
        return {f"base {base}": store.state() for base, store in enumerate(self._stores)}

    def restore(self, stores: Mapping[str, State]) -> None:
        for base, store in enumerate(self._stores):
            store.restore(stores[f"base {base}"])
        self._stacked = None
