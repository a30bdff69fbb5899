"""Answers: the hub finishes what a device has begun."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Answer, Infer
from export.split import NoHead, SplitModel
from server_hub.concurrency import BackgroundTasks, Effect
from server_hub.gateway.peers import Peer
from server_hub.methods.method import Method
from server_hub.rounds.validation import check_answer, check_packed
from server_hub.trunk.interface import Query, Trunk


class Answers:
    """Takes questions of devices, and sends the answers.

    Args:
        manifests: manifest by tier.
        model: the hub's model.
        method: holds the global model.
        trunk: computes the answers.
        post: sends an answer to a device.
        background: runs what takes longer.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        model: SplitModel,
        method: Method,
        trunk: Trunk,
        post: Callable[[Peer, Answer], None],
        background: BackgroundTasks,
    ) -> None:
        self._manifests, self._model, self._method = manifests, model, method
        self._trunk, self._post, self._background = trunk, post, background

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
        query = Query(manifest.cut, manifest.codec, message.parts, message.base, message.robustness)
        effect = Effect()
        self._background.spawn(self._answer(peer, message.request, heads, query, effect))
        return effect

    async def _answer(
        self, peer: Peer, request: int, heads: list[str], query: Query, effect: Effect
    ) -> None:
        logits = await self._trunk.answer(query)
        self._post(peer, Answer(request=request, heads=heads, logits=logits))
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
