"""Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747): narrow networks, mixed.

A wide model is split by width into K independent *base networks*. Each round::

    hub    : a device with a budget of b trains n = b K bases: the first from one shuffled queue,
             in which each base comes once before any comes again, the others at random
    device : E local epochs on each of its bases, and on examples that it has made hard
    hub    : each base becomes the mean of its copies, weighted by samples; others stay
    use    : the mean of the logits of any number of bases, the best first

A tier whose cut is the depth of the model trains its bases as a whole. Others train them up to
their cut, as in FedSplitX: auxiliary heads there, activations up, and the trunk trains the deep
part of all bases at once (:mod:`server_hub.trunk_stacked`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from edge_sdk.mix import tensor_of
from edge_sdk.protocol.tensors import TensorSpec
from export.bases import split_width
from export.split import SplitModel
from export.whole import whole_bases
from server_hub.layers import LayerCopy, LayerStore, State, split_by_layer, weighted_mean
from server_hub.methods.fleet import Fleet, Recipe, Schedule
from server_hub.methods.parts import DeviceUpdate, Method, SharedCopy, Stage, always
from server_hub.trunk import TrunkCopy


class BaseStore(LayerStore):
    """A base: tensors that nobody has trained, the noise norms of some rounds, keep their value."""

    def mean(self, layer: str, copies: Sequence[LayerCopy]) -> State:
        old = self.entries[layer].tensors
        tensors: State = {}
        for name, tensor in old.items():
            having = [copy for copy in copies if name in copy.tensors]
            tensors |= weighted_mean({name: tensor}, having) if having else {name: tensor}
        return tensors


class PerBase:
    """A store for each base; implements :class:`server_hub.methods.parts.Aggregation`.

    Args:
        initial: the tensors that are trained, each (bases, ...).
    """

    def __init__(self, initial: State) -> None:
        bases = len(next(iter(initial.values())))
        self.bases = [BaseStore({n: t[base] for n, t in initial.items()}) for base in range(bases)]
        self._stacked: State | None = None

    def base_state(self, base: int, specs: Sequence[TensorSpec]) -> State:
        """What a device starts from that trains a base."""
        everything = self.bases[base].state()
        return {spec.name: everything[spec.name] for spec in specs}

    def device_state(self, specs: Sequence[TensorSpec]) -> State:
        return self.base_state(0, specs)

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        if self._stacked is None:
            states = [store.state() for store in self.bases]
            self._stacked = {n: np.stack([state[n] for state in states]) for n in states[0]}
        return self._stacked

    def path_state(self, model: SplitModel, cut: int) -> State:
        return self.trunk_state()  # one object for all cuts, so that one set of models serves them

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        for base, store in enumerate(self.bases):
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
            deep = [
                LayerCopy(c.layer, c.tensors, c.samples, f"trunk/{c.replica}")
                for c in copies
                if c.base == base
            ]
            store.commit([*trained, *deep])
        self._stacked = None

    def stores(self) -> Mapping[str, State]:
        return {f"base {base}": store.state() for base, store in enumerate(self.bases)}

    def restore(self, stores: Mapping[str, State]) -> None:
        for base, store in enumerate(self.bases):
            store.restore(stores[f"base {base}"])
        self._stacked = None


def splitmix(initial: State, schedule: Schedule) -> Method:
    """Split-Mix as a composition.

    Args:
        initial: the tensors that are trained, each (bases, ...).
        schedule: has the :class:`Mixing`.
    """
    assert schedule.mixing is not None
    return Method(
        name="Split-Mix",
        stage=always(Stage("train" if schedule.split else "none")),
        copies=SharedCopy(),
        aggregation=PerBase(initial),
        paths=("mix",),
        mixing=schedule.mixing,
    )


def by_bases(fleet: Fleet) -> Fleet:
    """Every tier trains bases: whole ones, or up to its cut."""
    assert fleet.mixing is not None
    for name in fleet.tiers:
        fleet.mixing.count(name)
    bases = split_width(fleet.model, fleet.mixing.bases, fleet.example, seed=fleet.mixing.seed)
    if fleet.mixing.robustness and fleet.mixing.dual_norms:
        bases = bases.with_dual_norms()
    depth = fleet.model.depth
    cuts = {tier.cut for tier in fleet.tiers.values() if tier.cut < depth}
    found = whole_bases(bases, cuts, fleet.example, fleet.classes)
    tiers = {
        name: replace(
            tier,
            bases=fleet.mixing.bases,
            adversarial=bool(fleet.mixing.robustness) and tier.adversarial,
        )
        for name, tier in fleet.tiers.items()
    }
    models = {name: found.whole for name, tier in tiers.items() if tier.cut == depth}
    return replace(fleet, model=found.hub, tiers=tiers, models=models, bases=found.states)


SPLITMIX = Recipe("Split-Mix", splitmix, by_bases, takes_whole=True)
