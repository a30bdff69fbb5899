"""Aggregation of nested models of several widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_sdk.protocol.tensors import Array, State, TensorSpec
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.merged import Merged
from server_hub.trunk.interface import TrunkCopy


class Nested(Merged):
    """One store for nested models: a device holds the leading part of each tensor.

    Each element of a tensor is the mean over the copies that hold it, weighted by samples
    (HeteroFL, arXiv 2010.01264; FjORD, arXiv 2102.13451). There is no trunk.
    """

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        everything = self.trunk_state()
        return {
            spec.name: np.ascontiguousarray(everything[spec.name][leading(spec.shape)])
            for spec in specs
        }

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average each element over the copies that hold it; other elements keep their value."""
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
    """Return the index of the leading part, of shape ``shape``, of a larger tensor."""
    return tuple(slice(int(n)) for n in shape)
