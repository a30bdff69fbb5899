"""The layer store: one versioned entry per layer, and the average over all trained copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.tensors import Array, State
from export.tensor_names import layer_of


class NotFinite(CutlayerError):
    """A copy holds NaN or infinity.

    Attributes:
        tensor: name of the first tensor with such a value.
    """

    def __init__(self, tensor: str) -> None:
        super().__init__(f"tensor {tensor} holds values that are not finite")
        self.tensor = tensor


@dataclass(frozen=True)
class LayerCopy:
    """A copy of a layer that a device or the trunk has trained.

    Attributes:
        layer: name of the layer: ``stem``, ``block.3``, ``aux.2``, ``head``.
        tensors: tensors of the layer by full name.
        weight: weight in the mean, usually the number of samples that the copy was trained on.
        source: name of the device, or of the copy of the trunk, that has trained the layer.
    """

    layer: str
    tensors: Mapping[str, Array]
    weight: float
    source: str


@dataclass
class LayerEntry:
    """A layer in the store.

    Attributes:
        tensors: tensors of the layer by full name.
        version: number of commits that have changed the layer.
        trained_by: sources of the copies that the present version is the mean of.
    """

    tensors: State
    version: int = 0
    trained_by: list[str] = field(default_factory=list)


def check_finite(tensors: Mapping[str, Array]) -> None:
    """Raise :class:`NotFinite` for the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise NotFinite(name)


def split_by_layer(state: Mapping[str, Array]) -> dict[str, State]:
    """Group tensors, given by name, by the layer that they belong to."""
    layers: dict[str, State] = {}
    for name, tensor in state.items():
        layers.setdefault(layer_of(name), {})[name] = tensor
    return layers


def weighted_mean(old: Mapping[str, Array], copies: Sequence[LayerCopy]) -> State:
    """Return the weighted mean of copies of a layer, computed in float64.

    Args:
        old: present tensors of the layer by name; the mean has their names and dtypes.
        copies: copies of the layer, at least one; each has the tensors of ``old``.
    """
    if len(copies) == 1:
        return {name: np.array(copies[0].tensors[name], t.dtype) for name, t in old.items()}
    total = sum(copy.weight for copy in copies)
    tensors = {}
    for name, tensor in old.items():
        mean = np.zeros(tensor.shape, np.float64)
        for copy in copies:
            # a product of float32 and a Python float would be rounded to float32
            mean += np.multiply(copy.tensors[name], copy.weight / total, dtype=np.float64)
        tensors[name] = mean.astype(tensor.dtype)
    return tensors


def _by_layer(copies: Iterable[LayerCopy]) -> dict[str, list[LayerCopy]]:
    """Group finite copies by layer, without those of weight 0; raises :class:`NotFinite`."""
    groups: dict[str, list[LayerCopy]] = {}
    for copy in copies:
        if copy.weight > 0:
            check_finite(copy.tensors)
            groups.setdefault(copy.layer, []).append(copy)
    return groups


Rule = Callable[[Mapping[str, Array], Sequence[LayerCopy]], State]
"""Returns the new tensors of a layer by name, given the present ones and copies, at least one."""


class LayerStore:
    """The global model, layer by layer.

    Args:
        state: initial tensors by name.
        rule: averages the copies of a layer.
    """

    def __init__(self, state: Mapping[str, Array], rule: Rule = weighted_mean) -> None:
        self._rule = rule
        self.entries = {
            layer: LayerEntry({n: np.array(t) for n, t in tensors.items()})
            for layer, tensors in split_by_layer(state).items()
        }

    def commit(self, copies: Iterable[LayerCopy], parts: Iterable[LayerCopy] = ()) -> None:
        """Replace each layer by the average of its copies; layers without copies stay.

        The gradient of a tied tensor is a sum, and devices and the hub each have a part of it. So
        its change is a sum, too: the average change of the copies, and that of the parts.

        Sums are in float64, so that the order of the copies changes the result by rounding at most.

        Args:
            copies: trained copies of layers; copies of weight 0 are left out.
            parts: tied tensors as the hub has trained them, with its part of their gradient.

        Raises:
            NotFinite: a copy holds NaN or infinity; the store is unchanged.
        """
        by_layer, added = _by_layer(copies), _by_layer(parts)
        means = {layer: self.mean(layer, group) for layer, group in by_layer.items()}
        for layer, group in added.items():
            old = self.entries[layer].tensors
            means[layer] = means.get(layer, old) | self._sum(old, means.get(layer, old), group)
        for layer, tensors in means.items():
            entry = self.entries[layer]
            entry.tensors = tensors
            entry.version += 1
            group = [*by_layer.get(layer, ()), *added.get(layer, ())]
            entry.trained_by = [copy.source for copy in group]

    def _sum(
        self, old: Mapping[str, Array], mean: Mapping[str, Array], parts: Sequence[LayerCopy]
    ) -> State:
        """Return the tensors of parts, by name: their mean, plus what the parts have changed."""
        own = {n: t for n, t in old.items() if n in parts[0].tensors}
        rule = self._rule if len(parts) > 1 else weighted_mean
        return {
            n: (np.subtract(t, old[n], dtype=np.float64) + mean[n]).astype(t.dtype)
            for n, t in rule(own, parts).items()
        }

    def mean(self, layer: str, copies: Sequence[LayerCopy]) -> State:
        """Return the new tensors of a layer, by name: the average of its copies."""
        return self._rule(self.entries[layer].tensors, copies)

    def restore(self, state: Mapping[str, Array]) -> None:
        """Set tensors to a state that :meth:`state` returned."""
        for layer, tensors in split_by_layer(state).items():
            self.entries[layer].tensors = {n: np.array(t) for n, t in tensors.items()}

    def state(self, layers: Iterable[str] | None = None) -> State:
        """Return the tensors of layers, by name.

        Args:
            layers: names of layers; None for all. A layer without trained tensors has no entry.
        """
        given = self.entries if layers is None else layers
        wanted = [layer for layer in given if layer in self.entries]
        return {name: t for layer in wanted for name, t in self.entries[layer].tensors.items()}
