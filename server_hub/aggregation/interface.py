"""Interface of an aggregation: it holds the global model and averages what was trained into it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_sdk.protocol.tensors import State, TensorSpec
from export.split import SplitModel
from server_hub.trunk.interface import TrunkCopy


@dataclass(frozen=True)
class DeviceUpdate:
    """What a device has trained in a round.

    Attributes:
        device: name of the device.
        state: trained tensors by name; of base network N they are called
            ``base.N.NAME``.
        samples: number of local examples.
        metrics: what the device reports of its training, like ``loss`` and ``compute_s``.
    """

    device: str
    state: State
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Aggregation(Protocol):
    """Holds the global model, and averages into it what devices and trunk have trained.

    Tensors are never changed in place: a commit puts new arrays in the place of old ones.

    Attributes:
        order: numbers of the base networks, best first; empty for a single model.
    """

    order: list[int]

    def device_state(self, specs: Sequence[TensorSpec], base: int = 0) -> State:
        """The tensors that a device starts from which holds those of ``specs``.

        Args:
            specs: what the device holds.
            base: number of the base network; 0 for a single model.
        """

    def trunk_state(self, cuts: Collection[int] = ()) -> State:
        """The tensors that the trunk starts from, if activations enter at ``cuts``."""

    def path_state(self, model: SplitModel, cut: int) -> State:
        """The tensors of the whole model, for inputs that enter on a device with this cut.

        With base networks each tensor is (bases, ...).
        """

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average what was trained into the global model.

        Raises:
            NotFinite: an update or copy holds NaN or infinity; nothing was changed.
        """

    def models(self, model: SplitModel, cuts: Mapping[str, int]) -> dict[str | None, State]:
        """The whole models to save, by the name that tells their files apart.

        Args:
            model: the model, for the names of layers.
            cuts: cut by tier.

        Returns:
            One model under None; or one by tier, or by base network.
        """

    def stores(self) -> Mapping[str, State]:
        """All tensors by store, for :meth:`restore`."""

    def restore(self, stores: Mapping[str, State]) -> None:
        """Go back to tensors that :meth:`stores` has given."""
