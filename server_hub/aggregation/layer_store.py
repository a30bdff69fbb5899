"""LayerStore: one versioned entry per layer; averages every copy that was trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.tensors import Array, State
from export.names import layer_of


class NotFinite(CutlayerError):
    """A copy holds NaN or infinity. Attribute ``tensor`` names the first tensor that does."""

    def __init__(self, tensor: str) -> None:
        super().__init__(f"tensor {tensor} holds values that are not finite")
        self.tensor = tensor


@dataclass(frozen=True)
class LayerCopy:
    """A layer as somebody has trained it.

    Attributes:
        layer: name of the layer: ``stem``, ``block.3``, ``aux.2``, ``head``.
        tensors: tensors of the layer by full name.
        weight: weight in the mean, usually the number of samples that the copy was trained on.
        source: name of the device, or of the replica of the trunk, that has trained it.
    """

    layer: str
    tensors: Mapping[str, Array]
    weight: float
    source: str


@dataclass
class LayerEntry:
    """A layer in the store; ``trained_by`` names the sources that the present version averages."""

    tensors: State
    version: int = 0
    trained_by: list[str] = field(default_factory=list)


def check_finite(tensors: Mapping[str, Array]) -> None:
    """Raise :class:`NotFinite` for the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise NotFinite(name)


def split_by_layer(state: Mapping[str, Array]) -> dict[str, State]:
    """Group tensors by the layer that they belong to."""
    layers: dict[str, State] = {}
    for name, tensor in state.items():
        layers.setdefault(layer_of(name), {})[name] = tensor
    return layers


def weighted_mean(old: Mapping[str, Array], copies: Sequence[LayerCopy]) -> State:
    """The weighted mean of the copies' tensors, of those that ``old`` has, in its dtypes."""
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


class LayerStore:
    """The global model, layer by layer.

    Args:
        state: initial tensors by name.
    """

    def __init__(self, state: Mapping[str, Array]) -> None:
        self.entries = {
            layer: LayerEntry({n: np.array(t) for n, t in tensors.items()})
            for layer, tensors in split_by_layer(state).items()
        }

    def commit(self, copies: Iterable[LayerCopy]) -> None:
        """Replace each layer by the weighted mean of its copies; the others keep their value.

        Sums are in float64, so the result does not depend on the order of the copies by more
        than rounding.

        Raises:
            NotFinite: a copy holds NaN or infinity; nothing was changed.
        """
        by_layer: dict[str, list[LayerCopy]] = {}
        for copy in copies:
            if copy.weight <= 0:
                continue
            check_finite(copy.tensors)
            by_layer.setdefault(copy.layer, []).append(copy)
        means = {layer: self.mean(layer, group) for layer, group in by_layer.items()}
        for layer, group in by_layer.items():
            entry = self.entries[layer]
            entry.tensors = means[layer]
            entry.version += 1
            entry.trained_by = [copy.source for copy in group]

    def mean(self, layer: str, copies: Sequence[LayerCopy]) -> State:
        """What the copies of a layer become: their weighted mean."""
        return weighted_mean(self.entries[layer].tensors, copies)

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go back to tensors that :meth:`state` has given."""
        for layer, tensors in split_by_layer(state).items():
            self.entries[layer].tensors = {n: np.array(t) for n, t in tensors.items()}

    def state(self, layers: Iterable[str] | None = None) -> State:
        """Tensors of some layers, or of all; a layer in which all is frozen has none."""
        given = self.entries if layers is None else layers
        wanted = [layer for layer in given if layer in self.entries]
        return {name: t for layer in wanted for name, t in self.entries[layer].tensors.items()}
