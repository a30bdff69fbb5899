"""Cut moves: between two rounds a device may change to the bundle of another tier.

After every round the layer store holds the parameters of every layer, and its optimizer slots if
the method keeps them. A device that takes over a block finds these in the state of its new tier,
and the trunk finds those of a block that it gets back. A move therefore loses no training step.
"""

from __future__ import annotations

import asyncio
import logging
import math
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

_LOST_S = 2.0
"""Seconds that a round waits for a moving device whose connection has broken."""


class CutMoves:
    """Plans moves, tells devices to make them, and keeps the tiers that devices have moved to.

    Args:
        settings: settings of the table ``[cuts]``.
        index: index of the bundles.
        manifests: manifest by tier.
        gateway: holds the connected devices.
        leave: called with a device and a reason when the device cannot take part in rounds for a
            while.

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
        self._moving: dict[str, tuple[str, float]] = {}  # new tier, and when waiting ends
        self._ready: set[str] = set()
        self._tiers: dict[str, str] = {}  # tiers of moved devices, connected or not
        self._unfit: dict[str, set[str]] = {}
        self.cuts: dict[str, int] = {}
        """Cut layers, in the last round, of the devices that delivered, by device name."""
        self.planned: list[CutMove] = []
        """Moves that the policy has planned after the last round."""
        self._changes = Changes()

    def cut_of(self, device: str) -> int | None:
        """Return the cut layer of a device; None if it is not connected."""
        peer = self._gateway.peers.get(device)
        return None if peer is None else self.manifests[peer.tier].cut

    def under_way(self, device: str) -> bool:
        """Return whether a device is loading another bundle for a move."""
        return device in self._moving

    def plan(
        self,
        updates: Sequence[DeviceUpdate],
        losses: Mapping[str, tuple[float, int]],
        busy: float,
        last: bool,
    ) -> None:
        """Let the policy choose moves after a round, and set :attr:`cuts` and :attr:`planned`.

        Args:
            updates: updates of the devices that delivered.
            losses: by device, the sum of the trunk's loss over the device's labels, and the number
                of labels.
            busy: fraction of the round that the trunk spent in steps, from 0 to 1.
            last: whether the round is the last of the job, after which no device moves.
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

        A device sends ``ready`` when it has loaded the bundle. A device may have left since its
        move was planned, and may have come back with another tier.
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
        """Wait until the moving devices have loaded their bundles, or until the wait has ended.

        The wait for a device ends ``wait_s`` seconds after it was told to move, or soon after its
        connection broke. A device that takes longer misses rounds, and takes part again when it is
        ready.
        """
        now = asyncio.get_running_loop().time
        while now() < (end := max(map(self._wait_ends, self._moving), default=-math.inf)):
            await self._changes.next(end)

    def _wait_ends(self, device: str) -> float:
        """When the wait for a moving device ends if it does not get ready."""
        _, until = self._moving[device]
        lost_at = self._gateway.peers[device].lost_at
        return until if lost_at is None else min(until, lost_at + _LOST_S)

    def connection_changed(self) -> None:
        """The connection of a device has broken, or is there again."""
        self._changes.wake()

    def ready(self, peer: Peer, message: Ready) -> None:
        """Take a device's ``ready``: it has joined, has moved, or could not load the new bundle.

        Args:
            peer: the device.
            message: the message, with the tier of the loaded bundle.

        Raises:
            ProtocolError: the device has loaded a bundle that it was not told to load.
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
        """Forget a move of a device that has left."""
        self._moving.pop(device, None)
        self._ready.discard(device)
        self._changes.wake()

    def moved(self, device: str, issued: str | None, memory_mb: int | None) -> str | None:
        """Return the tier that a device has moved to, if it can continue there; otherwise None.

        Args:
            device: name of the device.
            issued: tier of the device's token; None if the token is for no tier. The device can
                only continue in a tier of the same kind.
            memory_mb: memory for training that the device reports, in MB; None if it reports none.
        """
        tier = self._tiers.get(device)
        if tier is None or tier not in self.manifests or not self._fits(tier, memory_mb):
            return None
        if issued is not None:  # a new token may be for a device of another kind
            own = self.manifests.get(issued)
            if own is None or _kind(own) != _kind(self.manifests[tier]):
                return None
        return tier

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` takes, as JSON can hold it.

        A device that is loading a bundle counts as moved.
        """
        ahead = {device: tier for device, (tier, _) in self._moving.items()}
        return {"tiers": self._tiers | ahead, "policy": self._policy.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set moves and policy to a value that :meth:`state` returned."""
        self._tiers = dict(state["tiers"])
        self._policy.restore(state["policy"])

    def _fits(self, tier: str, memory_mb: int | None) -> bool:
        """Return whether training in a tier fits the memory that a device reports, in MB."""
        return memory_mb is None or self._settings.memory_mb.get(tier, 0.0) <= memory_mb

    def _options(self, device: str) -> dict[int, str]:
        """Return the tiers, by cut layer, of the device's kind and within its memory."""
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
    """Return what a move never changes: runtime, codec, and whether there is an int8 graph."""
    return manifest.runtime, manifest.codec, "predict_int8" in manifest.graphs
