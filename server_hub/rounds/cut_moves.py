"""Moving cuts: a device goes on with the bundle of another tier, between two rounds.

What a layer has learned, and its optimizer's slots, are in the LayerStore after every round. So a
device that takes a block over finds them in the state of its new tier, and the trunk finds those
of a block that it gets back: nothing else has to be handed over, and no step is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Move, Ready
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.concurrency import Changes
from server_hub.gateway.peers import Peer
from server_hub.gateway.server import Gateway
from server_hub.rounds.cut_policy import CutMove, Cuts, Seen, policy_of

log = logging.getLogger("cutlayer.hub")


class CutMoves:
    """Which devices are to have another cut, which are on their way to it, and where they have got.

    Args:
        settings: the policy, and what bounds it.
        index: the bundles.
        manifests: by tier.
        gateway: where the devices are.
        leave: tells the rounds that a device is not there for a while, with the reason.

    Raises:
        ConfigError: the settings name a tier that has no bundle.
    """

    def __init__(
        self,
        settings: Cuts,
        index: BundleIndex,
        manifests: Mapping[str, Manifest],
        gateway: Gateway,
        leave: Callable[[str, str], None],
    ) -> None:
        for tier in settings.memory_mb:
            if tier not in manifests:
                known = ", ".join(sorted(manifests))
                raise ConfigError(f"[cuts.memory_mb] names the tier {tier!r}; there are {known}")
        self._settings, self._index, self.manifests = settings, index, manifests
        self._gateway, self._leave = gateway, leave
        self._policy = policy_of(settings.policy)
        self._moving: dict[str, tuple[str, float]] = {}  # to which tier, and waited for until when
        self._ready: set[str] = set()
        self._tiers: dict[str, str] = {}  # of those that have moved, also while they are away
        self._unfit: dict[str, set[str]] = {}
        self.cuts: dict[str, int] = {}
        """Cuts in the last round of the devices that have delivered."""
        self.planned: list[CutMove] = []
        """Moves after the last round."""
        self._changes = Changes()

    def cut_of(self, device: str) -> int | None:
        """The cut of a device, if it is here."""
        peer = self._gateway.peers.get(device)
        return None if peer is None else self.manifests[peer.tier].cut

    def under_way(self, device: str) -> bool:
        """Whether a device has been told to load another bundle, and has not said ready since."""
        return device in self._moving

    def plan(
        self,
        updates: Sequence[DeviceUpdate],
        losses: Mapping[str, tuple[float, int]],
        busy: float,
        last: bool,
    ) -> None:
        """Let the policy decide after a round, into :attr:`planned`.

        Args:
            updates: updates of the devices that have delivered.
            losses: by device, the sum of the trunk's loss over its labels, and their number.
            busy: share of the round that the trunk has spent in steps, from 0 to 1.
            last: whether the round is the job's last, after which nobody moves.
        """
        cuts = {update.device: self.cut_of(update.device) for update in updates}
        self.cuts = {device: cut for device, cut in cuts.items() if cut is not None}
        self.planned = [] if last else self._decide(updates, losses, busy)

    def _decide(
        self,
        updates: Sequence[DeviceUpdate],
        losses: Mapping[str, tuple[float, int]],
        busy: float,
    ) -> list[CutMove]:
        fleet = {}
        for update in updates:
            cut = self.cut_of(update.device)
            if cut is not None and update.device in self._ready:
                loss, labels = losses.get(update.device, (0.0, 0))
                fleet[update.device] = Seen(
                    cut=cut,
                    options=sorted(self._options(update.device)),
                    compute_s=update.metrics.get("compute_s"),
                    loss=loss / labels if labels else update.metrics.get("loss"),
                    wait_s=max(update.metrics.get("wait_s", 0.0), 0.0),
                )
        return [
            CutMove(device, fleet[device].cut, target.cut, target.reason)
            for device, target in self._policy.targets(fleet, busy).items()
            if target.cut != fleet[device].cut
        ]

    def begin(self) -> None:
        """Tell the devices of the planned moves to load another bundle.

        They say ``ready`` when they have it. Since a move was planned its device may have left,
        and even come back with another tier.
        """
        until = asyncio.get_running_loop().time() + self._settings.wait_s
        for move in self.planned:
            peer = self._gateway.peers.get(move.device)
            if peer is None or move.device not in self._ready:
                continue
            tier = self._options(move.device).get(move.to, peer.tier)
            if tier != peer.tier:
                log.debug("%s goes from cut %d to %d: %s", move.device, move.cut, move.to,
                         move.reason)  # fmt: skip
                self._leave(move.device, "it loads another bundle")
                self._moving[move.device] = tier, until
                manifest = self._index.tiers[tier].manifest
                self._gateway.post(peer, Move(tier=tier, manifest=manifest, reason=move.reason))

    async def until_ready(self) -> None:
        """Wait until the devices have loaded their bundles, or have taken too long.

        Those take part again when they have. A device is waited for once, however many rounds it
        takes.
        """
        now = asyncio.get_running_loop().time
        deadline = max((until for _, until in self._moving.values()), default=now())
        await self._changes.until(
            lambda: all(now() >= until for _, until in self._moving.values()), deadline
        )

    def ready(self, peer: Peer, message: Ready) -> None:
        """A device has its bundle; or the one that it was told to load; or could not load that.

        Raises:
            ProtocolError: it says that it has a bundle which it was not told to load.
        """
        device, (asked, _) = peer.device, self._moving.pop(peer.device, (None, 0.0))
        self._ready.add(device)
        self._changes.wake()
        if message.tier is not None and message.tier != peer.tier:
            if message.tier != asked:
                raise ProtocolError(
                    ErrorCode.UNKNOWN_TIER,
                    f"{device} says that it has the bundle of {message.tier!r}; "
                    f"it is of tier {peer.tier!r}",
                    "tier",
                )
            peer.tier = self._tiers[device] = message.tier
        elif asked is not None:
            log.warning("%s could not load the bundle of %s and stays at %s", device, asked,
                        peer.tier)  # fmt: skip
            self._unfit.setdefault(device, set()).add(asked)

    def gone(self, device: str) -> None:
        """A device has left."""
        self._moving.pop(device, None)
        self._ready.discard(device)
        self._changes.wake()

    def moved(self, device: str, issued: str | None, memory_mb: int | None) -> str | None:
        """The tier that a device has moved to, if it can go on there when it starts anew.

        Args:
            device: its name.
            issued: the tier of its token, whose kind it is of; None if the token is for none.
            memory_mb: what it can spare for training; None if it does not say.
        """
        tier = self._tiers.get(device)
        if tier is None or tier not in self.manifests or not self._fits(tier, memory_mb):
            return None
        if issued is not None:  # a token that was issued anew may be for a device of another kind
            own = self.manifests.get(issued)
            if own is None or _kind(own) != _kind(self.manifests[tier]):
                return None
        return tier

    def state(self) -> dict[str, Any]:
        """What a hub that goes on with the job needs to know, for JSON.

        Devices that are on their way to a tier are there by then.
        """
        ahead = {device: tier for device, (tier, _) in self._moving.items()}
        return {"tiers": self._tiers | ahead, "policy": self._policy.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self._tiers = dict(state["tiers"])
        self._policy.restore(state["policy"])

    def _fits(self, tier: str, memory_mb: int | None) -> bool:
        """Whether a tier takes no more memory than a device says it has."""
        return memory_mb is None or self._settings.memory_mb.get(tier, 0.0) <= memory_mb

    def _options(self, device: str) -> dict[int, str]:
        """The tiers that a device can go on with, by cut: of its kind, and within its memory."""
        peer = self._gateway.peers[device]
        own = self.manifests[peer.tier]
        found = {
            manifest.cut: name
            for name, manifest in self.manifests.items()
            if _kind(manifest) == _kind(own)
            and self._fits(name, peer.memory_mb)
            and name not in self._unfit.get(device, ())
        }
        return found | {own.cut: peer.tier}


def _kind(manifest: Manifest) -> tuple[str, str, bool]:
    """What a device keeps when its cut moves: runtime, codec, and a graph in 8 bits or not."""
    return manifest.runtime, manifest.codec, "predict_int8" in manifest.graphs
