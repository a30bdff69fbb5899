"""What devices bring in a round: checked, and on its way to the trunk or the average."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from edge_sdk.bundle.manifest import Manifest, tensor_of
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Activations, FeatureGradient, Features, Update
from edge_sdk.protocol.tensors import TensorSpec
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.layer_store import State
from server_hub.concurrency import Background
from server_hub.config import HubConfig
from server_hub.gateway.peers import Peer
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.method import RETURNING, Method, Stage
from server_hub.rounds.rounds import Rounds
from server_hub.rounds.validation import (
    check_features,
    check_labels,
    check_packed,
    check_present,
    check_update,
)
from server_hub.trunk.batcher import PendingBatch, StepBatcher
from server_hub.trunk.interface import Arrival, Finished, Trunk


@dataclass
class _Member:
    """What a device has brought in a round."""

    samples: int
    bases: list[int] | None = None
    activation_rows: int = 0
    state: State = field(default_factory=dict)
    unfinished: dict[int, tuple[Arrival, dict[str, int]]] = field(default_factory=dict)


class UpdateCollector:
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
        noise: the tensors of noise norms.
    """

    def __init__(
        self,
        config: HubConfig,
        manifests: Mapping[str, Manifest],
        method: Method,
        rounds: Rounds,
        trunk: Trunk,
        feed: StepBatcher,
        post: Callable[[Peer, Features], None],
        refused: Callable[[Peer, str], None],
        background: Background,
        noise: Collection[str] = (),
    ) -> None:
        self._config, self._manifests, self._method = config, manifests, method
        self._rounds, self._trunk, self._feed = rounds, trunk, feed
        self._post, self._refused, self._background = post, refused, background
        self._noise = frozenset(noise)
        self._members: dict[str, _Member] = {}
        self._stage = Stage("none")
        self.updates: dict[str, DeviceUpdate] = {}
        """Whole updates of the round, by device."""

    def join(self, device: str, samples: int) -> None:
        """A device says how many examples it has."""
        self._members[device] = _Member(samples)

    def _untrained(self, name: str) -> bool:
        """Whether a tensor of a base belongs to a noise norm."""
        return bool(self._noise) and name.split(".", 2)[2] in self._noise

    def begin(
        self, stage: Stage, members: Iterable[str], drawn: Mapping[str, list[int]] | None = None
    ) -> None:
        """A round begins; ``drawn`` are the base networks that each device trains."""
        self._stage = stage
        self.updates.clear()
        for device in members:
            bases = None if drawn is None else drawn[device]
            self._members[device] = _Member(self._members[device].samples, bases)

    def activations(self, peer: Peer, message: Activations, seq: int) -> None:
        if not self._rounds.expects(peer.device, message.round):
            peer.session.settle(seq)  # late, or from a device that is not in this round
            return
        manifest, member = self._manifests[peer.tier], self._members[peer.device]
        if manifest.whole or self._stage.activations == "none":
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                "no activations are wanted of this tier in this round",
                "parts",
            )
        sizes = check_packed(message.parts, manifest)
        u_shaped = self._stage.activations == "u_shaped"
        if u_shaped != (message.labels is None):
            raise ProtocolError(
                ErrorCode.BAD_LABELS,
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
        if self._method.mixing is not None:
            times = self._check_base(message, member, manifest, self._method.mixing)
        elif message.base or message.noise or message.present is not None:
            field = "base" if message.base else "noise" if message.noise else "present"
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, "the model is not one of several bases", field
            )
        if rows > self._config.local.batch_size or member.activation_rows > times * member.samples:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
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
            base=message.base,
            present=message.present,
            noise=message.noise,
            weight=self._weight(message, manifest),
        )
        if u_shaped and len(member.unfinished) >= self._config.limits.window:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"{len(member.unfinished)} batches are without the gradient of their features; "
                "send these first",
                "batch",
            )
        if u_shaped:
            self._background.spawn(self._features(peer, message, arrival, sizes, seq))
            return
        self._feed.put(PendingBatch(message.round, message.batch, arrival, peer, seq))

    def _hardens(self, manifest: Manifest) -> bool:
        """Whether devices of a tier train on examples that they make hard."""
        mixing = self._method.mixing
        return mixing is not None and mixing.robustness > 0 and "harden" in manifest.graphs

    def _weight(self, message: Activations, manifest: Manifest) -> float:
        """Of a label in the trunk's loss."""
        mixing = self._method.mixing
        if mixing is None or not self._hardens(manifest):
            return 1.0
        return mixing.robustness if message.noise else 1 - mixing.robustness

    def _check_base(
        self, message: Activations, member: _Member, manifest: Manifest, mixing: BaseAssignment
    ) -> int:
        """Activations are of a base that the device trains; how often each example may come."""
        assert member.bases is not None
        if message.base not in member.bases:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"activations of base {message.base}; the device trains "
                f"{', '.join(map(str, member.bases))} in this round",
                "base",
            )
        hardens = self._hardens(manifest)
        if message.noise and not hardens:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, "examples are not made hard in this tier and round", "noise"
            )
        assert message.labels is not None
        check_present(message.present, message.labels, manifest)
        return len(member.bases) * (2 if hardens else 1)

    def _specs(self, manifest: Manifest, member: _Member) -> list[TensorSpec]:
        """What an update has: the state, or that of each base."""
        specs = manifest.exchanged(self._method.keeps_slots)
        if member.bases is None:
            return list(specs)
        return [replace(s, name=tensor_of(base, s.name)) for base in member.bases for s in specs]

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
                ErrorCode.BAD_MESSAGE, f"there are no features of a batch {message.batch}", "batch"
            )
        arrival, sizes = kept
        check_features(message.parts, message.labels, sizes, self._manifests[peer.tier])
        arrival = replace(arrival, finished=Finished(message.parts, message.labels))
        self._feed.put(PendingBatch(message.round, message.batch, arrival, peer, seq))

    def update(self, peer: Peer, message: Update) -> None:
        if not self._rounds.expects(peer.device, message.round):
            return
        member = self._members[peer.device]
        manifest = self._manifests[peer.tier]
        check_update(message, self._specs(manifest, member), member.state, member.samples)
        member.state.update(message.tensors)
        if not message.done:
            return
        state = member.state
        if not self._hardens(manifest):  # nobody has trained its noise norms
            state = {n: t for n, t in state.items() if not self._untrained(n)}
        self.updates[peer.device] = DeviceUpdate(
            peer.device, state, member.samples, message.metrics
        )
        self._rounds.deliver(peer.device)
