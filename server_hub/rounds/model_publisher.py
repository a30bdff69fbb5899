"""The model publisher: states for devices, models for answers, files for people."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.store import sha256
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import State
from export.cutting.split_model import SplitModel
from export.tensor_names import is_slot
from server_hub.gateway.blobs import BlobServer
from server_hub.methods.method import Method
from server_hub.methods.plan import ModelOffer
from server_hub.trunk.interface import Trunk


class ModelPublisher:
    """Publishes the global model after every round.

    Args:
        method: holds the global model.
        model: the hub's model; its frozen tensors are saved with those that are trained.
        manifests: manifest by tier.
        blobs: serves states to devices.
        trunk: answers with the model.
    """

    def __init__(
        self,
        method: Method,
        model: SplitModel,
        manifests: Mapping[str, Manifest],
        blobs: BlobServer,
        trunk: Trunk,
    ) -> None:
        self._aggregation, self._keeps_slots = method.aggregation, method.keeps_slots
        self.model, self._manifests = model, manifests
        self._blobs, self._trunk = blobs, trunk
        trained = model.trained()
        # copies: starting the trunk's process moves the model's tensors to shared memory
        self._frozen = {
            n: t.detach().cpu().numpy().copy()
            for n, t in model.tensors().items()
            if n not in trained
        }
        self._packed: dict[str, dict[int, tuple[str, bytes]]] = {}

    async def publish(self) -> None:
        """Offer the present model to devices, and give it to the trunk to answer with."""
        cuts = {manifest.cut for manifest in self._manifests.values()}
        path = self._aggregation.path_state
        bases = len(self._aggregation.order)
        states = {cut: path(self.model, cut) for cut in cuts}
        _, self._packed = await asyncio.gather(
            self._trunk.serve(states, bases), asyncio.to_thread(self._pack)
        )
        self.offer()

    def offer(self) -> None:
        """Offer devices the states that were published last, base networks in their new order."""
        order = self._aggregation.order
        offers = {}
        for tier, states in self._packed.items():
            if order:
                offers[tier] = ModelOffer(bases={str(base): states[base][0] for base in order})
            else:
                offers[tier] = ModelOffer(state=states[0][0])
        contents = {
            name: data for states in self._packed.values() for name, data in states.values()
        }
        self._blobs.publish(offers, contents)

    def _pack(self) -> dict[str, dict[int, tuple[str, bytes]]]:
        """Hash and content of each state by tier and number of the base network, or 0."""
        packed: dict[str, dict[int, tuple[str, bytes]]] = {}
        for tier, manifest in self._manifests.items():
            specs = manifest.exchanged(self._keeps_slots)
            packed[tier] = {}
            for base in self._aggregation.order or [0]:
                data = pack_tensors(self._aggregation.device_state(specs, base))
                packed[tier][base] = sha256(data), data
        return packed

    def models(self) -> dict[str | None, State]:
        """The whole models to save, frozen tensors included, by what tells their files apart."""
        cuts = {tier: manifest.cut for tier, manifest in self._manifests.items()}
        found = self._aggregation.models(self.model, cuts)
        return {
            name: {**self._frozen, **{n: t for n, t in state.items() if not is_slot(n)}}
            for name, state in found.items()
        }

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes, as JSON can hold it."""
        return {"order": list(self._aggregation.order)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` has given."""
        self._aggregation.order = list(state["order"])
