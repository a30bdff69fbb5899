"""What the global model is offered as: states for devices, models for answers, files for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.frames import pack_tensors
from export.names import is_slot
from export.split import SplitModel
from server_hub.aggregation.layer_store import State
from server_hub.aggregation.per_base import PerBase
from server_hub.gateway.server import Gateway
from server_hub.methods.method import Method
from server_hub.storage.run_folder import RunFolder
from server_hub.trunk.interface import MixtureEvaluation, Trunk


class ModelPublisher:
    """The present states of the tiers.

    Args:
        method: holds the global model.
        model: as the hub has it.
        manifests: by tier.
        gateway: serves states to devices.
        trunk: answers with the model.
    """

    def __init__(
        self,
        method: Method,
        model: SplitModel,
        manifests: Mapping[str, Manifest],
        gateway: Gateway,
        trunk: Trunk,
    ) -> None:
        self._aggregation, self._keeps_slots = method.aggregation, method.keeps_slots
        self._model, self._manifests = model, manifests
        self._gateway, self._trunk = gateway, trunk
        self.states: dict[str, str] = {}
        """Hash of each tier's state."""
        self.bases: dict[str, dict[str, str]] = {}
        """Of base networks, by tier and number, those that answer best first."""
        self.order = list(range(0 if method.mixing is None else method.mixing.bases))
        """Numbers of the base networks, best first as far as that is known."""
        self.mixed: dict[int, float] = {}
        """How good the best so many are, mixed, where that was measured."""

    async def publish(self) -> None:
        """Offer each tier the present state, and give the trunk the model to answer with."""
        cuts = {manifest.cut for manifest in self._manifests.values()}
        path = self._aggregation.path_state
        await self._trunk.serve({cut: path(self._model, cut) for cut in cuts}, len(self.order))
        if isinstance(self._aggregation, PerBase):
            self._publish_bases(self._aggregation)
            return
        states = {}
        for tier, manifest in self._manifests.items():
            specs = manifest.exchanged(self._keeps_slots)
            states[tier] = pack_tensors(self._aggregation.device_state(specs))
        self.states = self._gateway.publish(states)

    def rank(self, report: MixtureEvaluation) -> None:
        """Put base networks in the order in which they were found to be good."""
        self.order, self.mixed = report.order, report.mixed
        assert isinstance(self._aggregation, PerBase)
        self._publish_bases(self._aggregation)

    def _publish_bases(self, aggregation: PerBase) -> None:
        self.bases = self._gateway.publish_bases(
            {
                tier: {
                    base: pack_tensors(aggregation.base_state(base, manifest.exchanged()))
                    for base in self.order
                }
                for tier, manifest in self._manifests.items()
            }
        )

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes, as JSON can hold it."""
        return {"order": self.order, "mixed": {str(n): v for n, v in self.mixed.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` has given."""
        self.order = list(state["order"])
        self.mixed = {int(n): value for n, value in state["mixed"].items()}

    def bases_of(self, tier: str, bases: Sequence[int]) -> dict[str, str]:
        """Where the states of some base networks are, by number."""
        return {str(base): self.bases[tier][str(base)] for base in bases}

    def save(self, run: RunFolder, frozen: State) -> None:
        """Write the present model: one file, or one per tier or base where there are several.

        Args:
            run: where.
            frozen: the tensors that nobody trains.
        """
        if isinstance(self._aggregation, PerBase):
            for base, store in enumerate(self._aggregation.bases):
                run.save_model({**frozen, **store.state()}, f"base-{base}")
            return
        states = {
            tier: self._aggregation.path_state(self._model, manifest.cut)
            for tier, manifest in self._manifests.items()
        }
        shared = len({id(state) for state in states.values()}) == 1
        for tier, state in states.items():
            trained = {name: tensor for name, tensor in state.items() if not is_slot(name)}
            run.save_model({**frozen, **trained}, None if shared else tier)
            if shared:
                break
