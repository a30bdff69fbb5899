"""Answers: the hub finishes what a device has begun."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Answer, Infer
from edge_sdk.protocol.tensors import Array, State
from export.cutting.split_model import NoHead, SplitModel
from server_hub.concurrency import BackgroundTasks, Effect, Turns
from server_hub.gateway.peers import Peer
from server_hub.methods.method import Method
from server_hub.rounds.validation import check_answer, check_packed
from server_hub.trunk.interface import Query, Trunk


class Answers:
    """Takes questions of devices, and sends the answers.

    A large question is answered in pieces, and devices take turns: another device's question waits
    for one piece at most.

    Args:
        manifests: manifest by tier.
        model: the hub's model.
        method: holds the global model.
        trunk: computes the answers.
        piece_rows: largest number of rows that are answered at a time.
        post: sends an answer to a device.
        failed: called with the error if the trunk could not answer a device.
        background: runs what takes longer.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        model: SplitModel,
        method: Method,
        trunk: Trunk,
        piece_rows: int,
        post: Callable[[Peer, Answer], None],
        failed: Callable[[Peer, Exception], None],
        background: BackgroundTasks,
    ) -> None:
        self._manifests, self._model, self._method = manifests, model, method
        self._trunk, self._post, self._failed = trunk, post, failed
        self._piece_rows, self._background = piece_rows, background
        self._turns = Turns()

    def infer(self, peer: Peer, message: Infer) -> Effect:
        """Take a question; its effect is complete once it is answered.

        Raises:
            ProtocolError: the question does not fit the tier, or the answer would be too large.
        """
        manifest = self._manifests.get(message.tier or peer.tier)
        if manifest is None:
            raise ProtocolError(
                ErrorCode.UNKNOWN_TIER, f"there is no tier {message.tier!r}", "tier"
            )
        sizes = check_packed(message.parts, manifest)
        heads = [f"aux.{depth}" for depth in self._model.head_depths if depth > manifest.cut]
        if not isinstance(self._model.head, NoHead):
            heads.append("head")
        if not heads:
            raise ProtocolError(ErrorCode.BAD_MESSAGE, "all of the model is on the device", "tier")
        self._check_options(message)
        check_answer(sizes, len(heads), manifest.classes)
        query = Query(
            manifest.cut,
            manifest.codec,
            message.parts,
            message.base,
            message.robustness,
            peer.device,
        )
        effect = Effect()
        pieces = [
            replace(query, parts=_rows_of(query.parts, manifest, first, first + self._piece_rows))
            for first in range(0, sizes["batch"], self._piece_rows)
        ]
        self._background.spawn(self._answer(peer, message.request, heads, pieces, effect))
        return effect

    async def _answer(
        self, peer: Peer, request: int, heads: list[str], pieces: list[Query], effect: Effect
    ) -> None:
        logits = []
        try:
            for piece in pieces:
                async with self._turns.turn(peer.device):
                    logits.append(await self._trunk.answer(piece))
        except Exception as error:
            self._failed(peer, error)
            return
        self._post(peer, Answer(request=request, heads=heads, logits=np.concatenate(logits, 1)))
        effect.complete()

    def _check_options(self, message: Infer) -> None:
        """There is such a base network, and the model can be as robust."""
        bases = max(len(self._method.aggregation.order), 1)
        if message.base >= bases:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"there is no base {message.base}; there are {bases}", "base"
            )
        if not 0 <= message.robustness <= 1:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"robustness is {message.robustness:g}, not in 0 to 1",
                "robustness",
            )


def _rows_of(parts: Mapping[str, Array], manifest: Manifest, first: int, end: int) -> State:
    """Some rows of packed activations; a part without rows of its own stays whole."""
    batch = {
        spec.name: spec.shape.index("batch") for spec in manifest.packed if "batch" in spec.shape
    }
    return {
        name: part[(slice(None),) * batch[name] + (slice(first, end),)] if name in batch else part
        for name, part in parts.items()
    }
