"""Aggregation of low-rank adapters, which are averaged as products B·A."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from edge_sdk.protocol.tensors import Array, State, TensorSpec
from export.adapters_lora.low_rank import AdapterCopy, adapter_pairs, average, reduce
from export.cutting.split_model import SplitModel
from export.steps.optimizers import get_optimizer
from export.tensor_names import TIED, is_slot, is_statistic, is_waiting, layer_of
from server_hub.aggregation.layer_store import LayerCopy, LayerStore, weighted_mean
from server_hub.aggregation.merged import Merged


class AdapterStore(LayerStore):
    """Averages adapters as products (HLoRA, https://arxiv.org/abs/2503.00813).

    The mean has the highest rank of any copy, and the basis and optimizer slots of the copies with
    this rank. If all copies have the same rank, the average loses nothing. A copy of a lower rank
    started from the best approximation of that rank. It contributes the change of its product, so
    that the rest of the old product is kept.
    """

    def mean(self, layer: str, copies: Sequence[LayerCopy]) -> State:
        old = self.entries[layer].tensors
        pairs = adapter_pairs(old)
        ranks = {a: max(len(copy.tensors[a]) for copy in copies) for a, _ in pairs}
        whole = [c for c in copies if all(len(c.tensors[a]) == r for a, r in ranks.items())]
        factors = {name for pair in pairs for name in pair}
        own = {name for name in old if name not in factors and not is_slot(name)}
        tensors = weighted_mean({n: old[n] for n in own}, copies)
        kept = bool(whole)
        total = sum(copy.weight for copy in whole)
        for a, b in pairs:
            adapters = [
                _changed(old[b], old[a], c.tensors[b], c.tensors[a], c.weight) for c in copies
            ]
            near = sum((c.weight / total * c.tensors[a] for c in whole), np.zeros(1))
            basis = near if whole else None
            tensors[b], tensors[a] = average(adapters, ranks[a], 1 / ranks[a], basis)
            apart = np.linalg.norm(tensors[a] - near) / np.linalg.norm(tensors[a])
            kept = kept and bool(apart < 0.5)
        like = max(copies, key=lambda copy: sum(len(copy.tensors[a]) for a in ranks)).tensors
        slots = {name: like[name] for name in old if is_slot(name)}
        tensors |= (
            weighted_mean(slots, whole)
            if kept  # otherwise the slots belong to another basis
            else {name: np.zeros_like(tensor) for name, tensor in slots.items()}
        )
        return {name: tensors[name] for name in old}


def _changed(old_B: Array, old_A: Array, B: Array, A: Array, weight: float) -> AdapterCopy:
    """Return the old product plus the change that a copy has made to it.

    The scale of a product is alpha / rank, with alpha = 1.
    """
    if len(A) >= len(old_A):
        return AdapterCopy(B, A, 1 / len(A), weight)
    start_B, start_A = reduce(old_B, old_A, len(A))  # the copy started from the state of at_ranks
    sides = np.hstack([old_B / len(old_A), -start_B / len(old_A), B / len(A)])
    return AdapterCopy(sides, np.vstack([old_A, start_A, A]), 1.0, weight)


class MergedAdapters(Merged):
    """One store of adapters and optimizer slots, for devices and trunk.

    The rank of adapters may be lower at a cut.

    Args:
        initial: initial trained tensors by name.
        optimizer: name of the optimizer of devices and trunk, whose slots are stored.
        cut_rank: rank of the adapters in the block that activations enter on the hub; None for the
            rank of the other blocks.
        tied: names of the tensors of the stem that the head on the hub reads. Their slots on the
            hub are stored beside those of the devices.
    """

    def __init__(
        self,
        initial: State,
        optimizer: str,
        cut_rank: int | None = None,
        tied: Collection[str] = (),
    ) -> None:
        super().__init__(initial)
        parameters = {
            n: torch.from_numpy(np.array(t)) for n, t in initial.items() if not is_statistic(n)
        }
        parameters |= {f"{TIED}.{n}": parameters[n] for n in tied}
        slots = get_optimizer(optimizer).slots(parameters)
        self.store = AdapterStore(initial | {n: t.numpy() for n, t in slots.items()})
        self._cut_rank = cut_rank
        self._ranks = {a: len(initial[a]) for a, _ in adapter_pairs(initial)}
        self._whole: tuple[State, State] | None = None

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        """Return a device's tensors, with adapters at the ranks in ``specs``."""
        everything = super().trunk_state()
        ranks = {s.name: int(s.shape[0]) for s in specs if ".lora_A." in s.name}
        state = {
            s.name: np.zeros([int(n) for n in s.shape], s.dtype) if is_waiting(s.name)
            else everything[s.name]
            for s in specs
        }  # fmt: skip
        return at_ranks(state, ranks)

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        """Return the trunk's tensors, with the rank at a cut in blocks that activations enter."""
        entered = {f"block.{cut}" for cut in cuts}
        ranks = {
            a: rank if self._cut_rank is None or layer_of(a) not in entered
            else min(self._cut_rank, rank)
            for a, rank in self._ranks.items()
        }  # fmt: skip
        return at_ranks(super().trunk_state(), ranks)

    def path_state(self, model: SplitModel, cut: int) -> State:
        """Return the whole model at its full ranks, as one object for all cuts."""
        everything = super().trunk_state()
        if self._whole is None or self._whole[0] is not everything:
            self._whole = everything, at_ranks(everything, self._ranks)
        return self._whole[1]

    def stores(self) -> Mapping[str, State]:
        return {"all": super().trunk_state()}


def at_ranks(state: State, ranks: Mapping[str, int]) -> State:
    """Return a state whose adapters have other ranks.

    The product of an adapter becomes its best approximation of the new rank. The optimizer slots of
    a layer with such an adapter become zero, because they belong to the old basis.

    Args:
        state: tensors by name.
        ranks: new rank by the name of an adapter's A; the other adapters keep their rank.
    """
    result = dict(state)
    for a, b in adapter_pairs(state):
        old, new = len(state[a]), ranks.get(a, len(state[a]))
        if new == old:
            continue
        B, A = reduce(state[b], state[a], new)
        result[a], result[b] = A, (B * (new / old)).astype(B.dtype)  # the scale is alpha / rank
        for name in [n for n in result if is_slot(n) and layer_of(n) == layer_of(a)]:
            whose = name.partition("/")[2]
            result[name] = np.zeros_like(result[whose] if whose in result else result[name])
    return result
