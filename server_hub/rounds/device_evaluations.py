"""Evaluation on the devices: how good the model is on examples that no hub ever sees.

Devices that keep examples back are asked after a round, and have until the next model is there, or
until a deadline. What they say cannot be checked; it is bounded, and a device's weight with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_sdk.bundle.ranges import MAX_POSITIONS
from edge_sdk.errors import ProtocolError
from edge_sdk.inference.metrics import LARGEST_LOSS, value_of
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.evaluation import Evaluate, Evaluated
from edge_sdk.protocol.message import EVALUATION
from edge_sdk.protocol.messages import Message
from server_hub.gateway.blobs import BlobServer
from server_hub.gateway.limits import Limits
from server_hub.gateway.peers import Peer
from server_hub.rounds.validation import counted_samples

log = logging.getLogger("cutlayer.hub")

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
"""The quantiles over devices, by the name that they have in records."""


@dataclass
class _Asked:
    """An evaluation in progress.

    Attributes:
        number: its number.
        tiers: tier of each device that was asked.
        waiting: devices that have not answered.
        without: number of devices that are ready, and keep nothing back.
        claims: what devices have said.
        figures: resolves to what they have said together.
    """

    number: int
    tiers: dict[str, str]
    waiting: set[str]
    without: int
    claims: dict[str, Evaluated]
    figures: asyncio.Future[dict[str, Any]]


class DeviceEvaluations:
    """Asks devices to evaluate the present model, and sums up what they say.

    Args:
        tiers: names of all tiers, in the order of reports.
        task: what labels say: ``classes`` or ``tokens``.
        paths: the ways to answer to evaluate.
        within_s: seconds that devices have.
        limits: bounds what a device may say.
        blobs: offers the present model.
        post: sends a message to a device.
    """

    def __init__(
        self,
        tiers: Iterable[str],
        task: str,
        paths: Sequence[str],
        within_s: float,
        limits: Limits,
        blobs: BlobServer,
        post: Callable[[Peer, Message], None],
    ) -> None:
        self._tiers = list(tiers)
        self._task, self._paths, self._within_s = task, list(paths), within_s
        self._limits, self._blobs, self._post = limits, blobs, post
        self._asked: _Asked | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def begin(self, number: int, peers: Sequence[Peer]) -> asyncio.Future[dict[str, Any]] | None:
        """Ask devices about the present model.

        Args:
            number: number of the round that made the model.
            peers: the devices that are ready.

        Returns:
            What they say, as a record holds it; None if nobody keeps examples back.
        """
        self.end()
        able = [peer for peer in peers if EVALUATION in peer.session.extensions]
        if not able or not self._within_s:
            return None
        loop = asyncio.get_running_loop()
        tiers = {peer.device: peer.tier for peer in able}
        without = len(peers) - len(able)
        self._asked = _Asked(number, tiers, set(tiers), without, {}, loop.create_future())
        figures = self._asked.figures
        self._deadline = loop.call_later(self._within_s, self.end)
        for peer in able:
            offer = vars(self._blobs.offer(peer.tier))
            self._post(
                peer,
                Evaluate(number=number, paths=self._paths, within_s=self._within_s, **offer),
            )
        return figures

    def take(self, peer: Peer, message: Evaluated) -> None:
        """A device says what it has found; it is ignored if it comes late, twice or unasked.

        Raises:
            ProtocolError: the figures are not those that were asked for, or out of range.
        """
        self._check(message)
        asked = self._asked
        if asked is None or message.number != asked.number or peer.device not in asked.waiting:
            return
        asked.claims[peer.device] = message
        self.gone(peer.device)

    def gone(self, device: str) -> None:
        """Nothing more is expected of a device."""
        if self._asked is not None and device in self._asked.waiting:
            self._asked.waiting.discard(device)
            if not self._asked.waiting:
                self.end()

    def end(self) -> None:
        """Sum up what devices have said; what comes from now on is late."""
        asked, self._asked = self._asked, None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if asked is None:
            return
        if asked.waiting:
            log.info(
                "evaluation after round %d goes on without %s",
                asked.number,
                ", ".join(sorted(asked.waiting)),
            )
        if not asked.figures.done():  # its reader may have been cancelled
            asked.figures.set_result(self._summary(asked))

    def _check(self, message: Evaluated) -> None:
        most = self._limits.samples * (1 if self._task == "classes" else MAX_POSITIONS)
        if message.labels > most:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"{message.labels} labels; a device may have {most} at most, see samples in "
                "[limits]",
                "labels",
            )
        wanted = set(self._paths) if message.labels else set()
        if set(message.results) != wanted:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"results must be of {', '.join(sorted(wanted)) or 'nothing'}",
                "results",
            )
        highest = 1.0 if self._task == "classes" else LARGEST_LOSS
        if not all(0 <= value <= highest for value in message.results.values()):
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"results must be from 0 to {highest:g}", "results"
            )

    def _summary(self, asked: _Asked) -> dict[str, Any]:
        """What devices have said, as a record holds it."""
        useful = {device: claim for device, claim in asked.claims.items() if claim.labels}
        tiers: dict[str, dict[str, Evaluated]] = {}
        for device, claim in sorted(useful.items()):
            tiers.setdefault(asked.tiers[device], {})[device] = claim
        silent = len(asked.tiers) - len(asked.claims)
        return {
            "asked": len(asked.tiers),
            "answered": len(useful),
            "silent": silent,
            "without": asked.without + len(asked.claims) - len(useful),
            "tiers": {tier: self._of_tier(tiers[tier]) for tier in self._tiers if tier in tiers},
        }

    def _of_tier(self, claims: Mapping[str, Evaluated]) -> dict[str, Any]:
        labels = {device: claim.labels for device, claim in claims.items()}
        counted = counted_samples(labels, self._limits.samples_over_median)
        weights = [counted[device] for device in claims]
        paths = {}
        for path in self._paths:
            means = [claim.results[path] for claim in claims.values()]
            values = [value_of(self._task, mean) for mean in means]
            mean = value_of(self._task, float(np.average(means, weights=weights)))
            quantiles = np.quantile(values, list(QUANTILES.values()))
            paths[path] = {
                "mean": mean,
                **dict(zip(QUANTILES, map(float, quantiles), strict=True)),
            }
        return {"devices": len(claims), "labels": sum(labels.values()), "paths": paths}
