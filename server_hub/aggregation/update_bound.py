"""The bound on updates: how far a device may move a layer in one round.

An update is clipped to a multiple of the usual distance, layer by layer (norm bounding, Sun et al.,
https://arxiv.org/abs/1911.07963). The usual distance comes from the devices themselves, so that it
follows learning rates and the progress of training. No device can raise it: it is a median.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from edge_sdk.bundle.manifest import tensor_of
from edge_sdk.protocol.tensors import Array, State, TensorSpec
from export.tensor_names import is_slot, is_statistic, layer_of
from server_hub.aggregation.interface import DeviceUpdate

log = logging.getLogger("cutlayer.hub")

FEW = 5
"""Number of copies below which the median of a round is that of too few devices. Distances of
earlier rounds then join it."""

_UNSURE = 4.0
"""Factor of the bound in rounds with few copies. Honest devices with other classes or more examples
than the others are often the only ones of their kind there."""

_REMEMBERED = 16
"""Number of distances of a layer that are kept for rounds with few copies."""

_OWN = 5
"""Number of a device's own distances of a layer that are kept."""

_OWN_FACTOR = 3.0
"""The bound by a device's own history as a multiple of the bound by the median."""


class StartingPoints(Protocol):
    """Gives the state that devices have started a round from; every aggregation does."""

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        """See :meth:`server_hub.aggregation.interface.Aggregation.device_state`."""


@dataclass(frozen=True)
class _Moved:
    """The tensors of one kind of a layer in an update.

    Attributes:
        update: the update's place among the updates.
        names: names of the tensors.
        distance: root mean square of the change of their elements.
    """

    update: int
    names: tuple[str, ...]
    distance: float


class UpdateBound:
    """Clips the updates of devices, layer by layer, and remembers distances between rounds.

    The distance of an update is the root mean square of the changes of a layer's elements, so that
    nested widths and ranks compare. An update within ``factor`` times the median of the round's
    copies of the layer stays as it is, bit for bit. A longer one is shortened to this bound; its
    direction stays. With fewer than :data:`FEW` copies, distances of earlier rounds join the
    median, and the bound is four times as far, because such a median says less. The other layers of
    the update then say more: the layer is shortened at least as much as each of those that have
    enough copies. A device's own median bounds it too, at three times the factor. Optimizer slots
    and running statistics grow with the square of gradients; the square of the factor bounds them.

    Args:
        factor: largest distance, as a multiple of the median; infinity for no bound.
    """

    def __init__(self, factor: float = 1.5) -> None:
        self.factor = factor
        self._layers: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=_REMEMBERED)
        )
        self._devices: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_OWN))

    def apply(
        self, start: StartingPoints, updates: Sequence[DeviceUpdate]
    ) -> Sequence[DeviceUpdate]:
        """Return the updates of a round, clipped.

        Args:
            start: gives the states that the devices have started from.
            updates: finite updates of devices.
        """
        if math.isinf(self.factor):
            return updates
        starts = _starts(start, updates)
        states = [dict(update.state) for update in updates]
        clipped: dict[str, float] = {}
        scales = [1.0] * len(updates)  # by update, the smallest factor of layers with enough copies
        kinds = _moved(starts, updates)
        for kind in sorted(kinds, key=lambda k: (len(kinds[k]) < FEW, not _is_parameters(k))):
            group = kinds[kind]
            bound = self._bound(kind, [m.distance for m in group])
            sure, parameters = len(group) >= FEW, _is_parameters(kind)
            kept = []
            for moved in group:
                device = updates[moved.update].device
                own = self._devices[f"{device}/{kind}"]
                limit = min(bound, _own_bound(own, self._factor(kind)))
                scale = scales[moved.update]
                if not sure:
                    limit = min(limit, moved.distance * (scale if parameters else scale**2))
                elif parameters and moved.distance > limit:
                    scales[moved.update] = min(scale, limit / moved.distance)
                if moved.distance > limit:
                    state = states[moved.update]
                    shrunk = _shrunk(starts[moved.update], state, moved, limit)
                    state.update(shrunk)
                    clipped[device] = max(clipped.get(device, 0.0), moved.distance / (limit or 1.0))
                kept.append(min(moved.distance, limit))
                own.append(kept[-1])
            self._layers[kind].extend(kept)
        for device, times in sorted(clipped.items()):
            log.debug("update of %s clipped: up to %.3g times the bound", device, times)
        return [replace(u, state=state) for u, state in zip(updates, states, strict=True)]

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` takes, as JSON can hold it."""
        return {
            "layers": {name: list(kept) for name, kept in self._layers.items()},
            "devices": {name: list(kept) for name, kept in self._devices.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the remembered distances to a value that :meth:`state` returned."""
        for kept, given in ((self._layers, state["layers"]), (self._devices, state["devices"])):
            kept.clear()
            for name, distances in given.items():
                kept[name].extend(distances)

    def _factor(self, kind: str) -> float:
        return self.factor if _is_parameters(kind) else self.factor**2

    def _bound(self, kind: str, distances: Sequence[float]) -> float:
        """Return the largest distance for a round's copies of the tensors ``kind``."""
        if len(distances) >= FEW:
            return self._factor(kind) * _lower_median(distances)
        return _UNSURE * self._factor(kind) * _lower_median([*distances, *self._layers[kind]])


def _own_bound(own: Sequence[float], factor: float) -> float:
    """Return the largest distance for a device, given its own earlier ones."""
    usual = _lower_median(own) if own else 0.0
    return factor * _OWN_FACTOR * usual if usual else math.inf


def _lower_median(values: Sequence[float]) -> float:
    """Return the median; of an even number of values the lower one of the two in the middle."""
    return sorted(values)[(len(values) - 1) // 2]


def _starts(start: StartingPoints, updates: Sequence[DeviceUpdate]) -> list[State]:
    """Return the tensors that each device has started from, by their names in its update."""
    found: dict[tuple[Any, ...], State] = {}
    starts = []
    for update in updates:
        mine: State = {}
        by_base: dict[int | None, list[TensorSpec]] = {}
        for name, tensor in update.state.items():
            base, own = _base_of(name)
            by_base.setdefault(base, []).append(TensorSpec(own, str(tensor.dtype), tensor.shape))
        for base, specs in by_base.items():
            key = (base, *specs)
            if key not in found:
                found[key] = start.device_state(specs, base or 0)
            mine |= {n if base is None else tensor_of(base, n): t for n, t in found[key].items()}
        starts.append(mine)
    return starts


def _base_of(name: str) -> tuple[int | None, str]:
    """Split the name of a tensor of a base network, ``base.N.NAME``; None for a single model."""
    first, _, rest = name.partition(".")
    if first != "base":
        return None, name
    number, _, own = rest.partition(".")
    return int(number), own


def _moved(starts: Sequence[State], updates: Sequence[DeviceUpdate]) -> dict[str, list[_Moved]]:
    """Return what each update has moved, by kind of tensors, layer and base network."""
    kinds: dict[str, list[_Moved]] = {}
    for i, (start, update) in enumerate(zip(starts, updates, strict=True)):
        groups: dict[str, list[str]] = {}
        for name, tensor in update.state.items():
            if tensor.dtype.kind == "f":
                groups.setdefault(_kind_of(name), []).append(name)
        for kind, names in groups.items():
            squares = sum(float(np.square(_change(start[n], update.state[n])).sum()) for n in names)
            size = sum(update.state[n].size for n in names)
            moved = _Moved(i, tuple(names), math.sqrt(squares / max(size, 1)))
            kinds.setdefault(kind, []).append(moved)
    return kinds


def _kind_of(name: str) -> str:
    """Return kind, layer and base network of a tensor, for tensors that are clipped together."""
    base, own = _base_of(name)
    kind = "parameters"
    if is_slot(own):
        kind = own.partition("/")[0]
    elif is_statistic(own):
        kind = "statistics"
    return f"{kind} {layer_of(own)}" if base is None else f"{kind} {base}.{layer_of(own)}"


def _is_parameters(kind: str) -> bool:
    return kind.startswith("parameters ")


def _change(start: Array, end: Array) -> Array:
    return np.subtract(end, start, dtype=np.float64)


def _shrunk(start: State, state: Mapping[str, Array], moved: _Moved, limit: float) -> State:
    """Return the tensors of ``moved`` at the distance ``limit`` from their start."""
    scale = limit / moved.distance
    return {
        n: (start[n] + scale * _change(start[n], state[n])).astype(state[n].dtype)
        for n in moved.names
    }
