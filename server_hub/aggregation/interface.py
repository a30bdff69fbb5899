"""The interface of an aggregation, which holds the global model and averages updates into it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_sdk.protocol.tensors import State, TensorSpec
from export.cutting.split_model import SplitModel
from server_hub.trunk.interface import TrunkCopy


@dataclass(frozen=True)
class DeviceUpdate:
    """The update of a device in a round.

    Attributes:
        device: name of the device.
        state: trained tensors by name; those of base network N have names ``base.N.NAME``.
        samples: number of local examples that the update counts for.
        metrics: metrics of the device's training by name, like ``loss`` and ``compute_s``.
    """

    device: str
    state: State
    samples: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Aggregation(Protocol):
    """Holds the global model, and averages the updates of devices and trunk into it.

    An aggregation never changes a tensor in place: a commit replaces arrays by new ones.

    Attributes:
        order: numbers of the base networks, best first; empty for a single model.
    """

    order: list[int]

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        """Return the tensors that a device starts a round from, by name.

        Args:
            specs: names and shapes of the tensors that the device holds.
            base: number of the base network; 0 for a single model.
        """

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        """Return the tensors that the trunk starts a round from, by name.

        Args:
            cuts: cut layers at which activations enter.
        """

    def path_state(self, model: SplitModel, cut: int) -> State:
        """Return the tensors of the whole model, by name, for devices with the cut ``cut``.

        With base networks each tensor is (bases, ...).

        Args:
            model: the model, for the names of layers.
            cut: cut layer of the devices.
        """

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average updates into the global model.

        Args:
            updates: updates of devices.
            copies: layers that the trunk has trained.

        Raises:
            NotFinite: an update or copy holds NaN or infinity; the global model is unchanged.
        """

    def models(self, model: SplitModel, cuts: Mapping[str, int]) -> dict[str | None, State]:
        """Return the whole models to save, by the name that tells their files apart.

        Args:
            model: the model, for the names of layers.
            cuts: cut by tier.

        Returns:
            One model under None; or one model per tier or per base network.
        """

    def stores(self) -> Mapping[str, State]:
        """Return all tensors by name, by store, for :meth:`restore`."""

    def restore(self, stores: Mapping[str, State]) -> None:
        """Set the global model to tensors that :meth:`stores` returned."""
