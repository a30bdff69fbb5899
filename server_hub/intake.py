"""What devices bring in a round: checked, and on its way to the trunk or the average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from edge_sdk.bundle import Manifest
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import Activations, FeatureGradient, Features, Update
from server_hub.background import Background
from server_hub.checks import check_features, check_labels, check_packed, check_update
from server_hub.config import HubConfig
from server_hub.feed import Feed, Waiting
from server_hub.gateway import Peer
from server_hub.layers import State
from server_hub.methods.parts import RETURNING, DeviceUpdate, Method, Stage
from server_hub.rounds import Rounds
from server_hub.trunk import Arrival, Finished, Trunk


@dataclass
class _Member:
    """What a device has brought in a round."""

    samples: int
    activation_rows: int = 0
    state: State = field(default_factory=dict)
    unfinished: dict[int, tuple[Arrival, dict[str, int]]] = field(default_factory=dict)


class Intake:
    """Takes activations, gradients of features, and updates.

    Args:
        config: of the hub.
        manifests: by tier.
        method: the training method.
        rounds: who takes part in which.
        trunk: gives the features of activations whose labels stay on the device.
        feed: takes what the trunk is to be trained on.
        post: sends features to a device.
        refused: told of a device whose activations are of no use, with the reason.
        background: runs what takes longer.
    """

    def __init__(
        self,
        config: HubConfig,
        manifests: Mapping[str, Manifest],
        method: Method,
        rounds: Rounds,
        trunk: Trunk,
        feed: Feed,
        post: Callable[[Peer, Features], None],
        refused: Callable[[Peer, str], None],
        background: Background,
    ) -> None:
        self._config, self._manifests, self._method = config, manifests, method
        self._rounds, self._trunk, self._feed = rounds, trunk, feed
        self._post, self._refused, self._background = post, refused, background
        self._members: dict[str, _Member] = {}
        self._stage = Stage("none")
        self.updates: dict[str, DeviceUpdate] = {}
        """Whole updates of the round, by device."""

    def join(self, device: str, samples: int) -> None:
        """A device says how many examples it has."""
        self._members[device] = _Member(samples)

    def begin(self, stage: Stage, members: Iterable[str]) -> None:
        """A round begins."""
        self._stage = stage
        self.updates.clear()
        for device in members:
            self._members[device] = _Member(self._members[device].samples)

    def activations(self, peer: Peer, message: Activations, seq: int) -> None:
        if not self._rounds.expects(peer.device, message.round):
            peer.session.settle(seq)  # late, or from a device that is not in this round
            return
        manifest, member = self._manifests[peer.tier], self._members[peer.device]
        sizes = check_packed(message.parts, manifest)
        u_shaped = self._stage.activations == "u_shaped"
        if u_shaped != (message.labels is None):
            raise ProtocolError(
                "bad_labels",
                "labels stay on the devices in this round"
                if u_shaped
                else "labels are missing; the hub trains the head in this round",
                "labels",
            )
        if message.labels is not None:
            check_labels(message.labels, sizes, manifest)
        rows = sizes["batch"]
        member.activation_rows += rows
        times = self._config.local.epochs if self._stage.activations in RETURNING else 1
        if rows > self._config.local.batch_size or member.activation_rows > times * member.samples:
            raise ProtocolError(
                "bad_message",
                f"{member.activation_rows} rows of activations in batches of {rows}; a "
                f"round takes each of {member.samples} examples "
                f"{'once' if times == 1 else f'{times} times'}, in batches of at most "
                f"{self._config.local.batch_size}",
                "parts",
            )
        arrival = Arrival(
            peer.device,
            self._method.copies.replica_of(peer.device),
            manifest.cut,
            manifest.codec,
            message.parts,
            message.labels,
        )
        if u_shaped and len(member.unfinished) >= self._config.limits.window:
            raise ProtocolError(
                "bad_message",
                f"{len(member.unfinished)} batches are without the gradient of their features; "
                "send these first",
                "batch",
            )
        if u_shaped:
            self._background.spawn(self._features(peer, message, arrival, sizes, seq))
            return
        self._feed.put(Waiting(message.round, message.batch, arrival, peer, seq))

    async def _features(
        self, peer: Peer, message: Activations, arrival: Arrival, sizes: dict[str, int], seq: int
    ) -> None:
        """Send back what leaves the last block, and keep the activations for the step."""
        texts = self._manifests[peer.tier].task == "tokens"
        shape = (sizes["batch"], sizes["seq"]) if texts else (sizes["batch"],)
        arrival = replace(arrival, shape=shape)
        parts = await self._trunk.features(arrival)
        peer.session.settle(seq)
        if not self._rounds.expects(peer.device, message.round):
            return
        if parts is None:
            self._refused(peer, "the activations are not finite")
            return
        self._members[peer.device].unfinished[message.batch] = arrival, sizes
        self._post(peer, Features(round=message.round, batch=message.batch, parts=parts))

    def finished(self, peer: Peer, message: FeatureGradient, seq: int) -> None:
        """A device has made the head's step; the trunk can make its own."""
        if not self._rounds.expects(peer.device, message.round):
            peer.session.settle(seq)
            return
        kept = self._members[peer.device].unfinished.pop(message.batch, None)
        if kept is None:
            raise ProtocolError(
                "bad_message", f"there are no features of a batch {message.batch}", "batch"
            )
        arrival, sizes = kept
        check_features(message.parts, message.labels, sizes, self._manifests[peer.tier])
        arrival = replace(arrival, finished=Finished(message.parts, message.labels))
        self._feed.put(Waiting(message.round, message.batch, arrival, peer, seq))

    def update(self, peer: Peer, message: Update) -> None:
        if not self._rounds.expects(peer.device, message.round):
            return
        member = self._members[peer.device]
        specs = self._manifests[peer.tier].exchanged(self._method.keeps_slots)
        check_update(message, specs, member.state, member.samples)
        member.state.update(message.tensors)
        if not message.done:
            return
        self.updates[peer.device] = DeviceUpdate(
            peer.device, member.state, member.samples, message.metrics
        )
        self._rounds.deliver(peer.device)
