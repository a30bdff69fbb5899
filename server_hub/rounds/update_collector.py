"""The update collector: takes in what devices send in a round, for the trunk and the average."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from edge_sdk.bundle.manifest import Manifest, tensor_of
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.enums import ActivationMode, ErrorCode
from edge_sdk.protocol.messages import Activations, FeatureGradient, Features, Message, Update
from edge_sdk.protocol.tensors import State, TensorSpec
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.concurrency import BackgroundTasks, Effect
from server_hub.gateway.limits import Limits
from server_hub.gateway.peers import Peer
from server_hub.methods.plan import DevicePlan, RoundPlan
from server_hub.rounds.rounds import Rounds
from server_hub.rounds.validation import (
    check_base_network,
    check_features,
    check_labels,
    check_packed,
    check_rows,
    check_samples,
    check_update,
    checked_metrics,
    counted_samples,
)
from server_hub.trunk.batcher import PendingBatch, StepBatcher
from server_hub.trunk.interface import StepInput, Trunk


@dataclass
class _Member:
    """A device in the present round.

    Attributes:
        plan: what it does, and what it owes.
        samples: number of its local examples, as it says.
        counted: number of local examples that it counts for.
        rows: number of rows of activations that it has sent.
        state: tensors of its update that have arrived.
        features: by number of a batch whose labels stay on the device and whose features were sent
            back: the batch, and the sizes of its symbolic dimensions.
    """

    plan: DevicePlan
    samples: int
    counted: float
    rows: int = 0
    state: State = field(default_factory=dict)
    features: dict[int, tuple[StepInput, dict[str, int]]] = field(default_factory=dict)


class UpdateCollector:
    """Takes activations, gradients of features, and updates.

    Args:
        manifests: manifest by tier.
        keeps_slots: whether updates hold optimizer slots.
        limits: the window, which bounds the batches of a device that wait for gradients of
            features, and the bounds of what a device says about its examples.
        rounds: which devices take part in which round.
        trunk: computes features.
        batcher: takes the batches that the trunk is to be trained on.
        post: sends a message to a device.
        refused: called with the reason if a device has sent activations that are of no use.
        failed: called with the error if the trunk could not compute a device's features.
        background: runs what takes longer.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        keeps_slots: bool,
        limits: Limits,
        rounds: Rounds,
        trunk: Trunk,
        batcher: StepBatcher,
        post: Callable[[Peer, Message], None],
        refused: Callable[[Peer, str], None],
        failed: Callable[[Peer, Exception], None],
        background: BackgroundTasks,
    ) -> None:
        self._manifests, self._keeps_slots, self._limits = manifests, keeps_slots, limits
        self._rounds, self._trunk, self._batcher = rounds, trunk, batcher
        self._post, self._refused, self._failed = post, refused, failed
        self._background = background
        self._samples: dict[str, int] = {}
        self._members: dict[str, _Member] = {}
        self._updates: dict[str, DeviceUpdate] = {}
        self._began = 0.0

    def join(self, device: str, samples: int) -> None:
        """A device says how many local examples it has.

        Raises:
            ProtocolError: it says that it has more than the operator allows.
        """
        check_samples(samples, self._limits.samples)
        self._samples[device] = samples

    def begin(self, plan: RoundPlan) -> None:
        """Begin a round."""
        self._updates.clear()
        self._began = asyncio.get_running_loop().time()
        claimed = {device: self._samples[device] for device in self._rounds.members}
        counted = counted_samples(claimed, self._limits.samples_over_median)
        self._members = {
            device: _Member(plan.devices[device], samples, counted[device])
            for device, samples in claimed.items()
        }

    def recount(self, device: str, number: int, samples: int) -> None:
        """A device begins a round with another number of examples than it has said.

        It counts from this round on; from the next one if the round is over.

        Args:
            device: name of the device.
            number: number of the round.
            samples: number of its local examples now.

        Raises:
            ProtocolError: it says that it has more than the operator allows; or it has sent
                something else of the round before, which was held against the former number.
        """
        self.join(device, samples)
        if not self._rounds.expects(device, number):
            return
        member = self._members[device]
        if member.rows or member.state:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"round {number} has begun with {member.samples} examples",
                "from_round",
            )
        claimed = {name: other.samples for name, other in self._members.items()}
        claimed[device] = member.samples = samples
        member.counted = counted_samples(claimed, self._limits.samples_over_median)[device]

    def updates(self) -> list[DeviceUpdate]:
        """The updates of the devices that have delivered, in the order of their names."""
        return [self._updates[device] for device in sorted(self._rounds.delivered)]

    def activations(self, peer: Peer, message: Activations) -> Effect | None:
        """Take a batch of activations; its effect is complete once it is sure to be trained on."""
        if not self._rounds.expects(peer.device, message.round):
            return None  # late, or from a device that is not in this round
        manifest, member = self._manifests[peer.tier], self._members[peer.device]
        plan = member.plan
        if plan.activations is ActivationMode.NONE:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                "no activations are wanted of this tier in this round",
                "parts",
            )
        sizes = check_packed(message.parts, manifest)
        u_shaped = plan.activations is ActivationMode.U_SHAPED
        check_labels(message.labels, sizes, manifest, on_device=u_shaped)
        check_base_network(message, plan, manifest)
        member.rows += sizes["batch"]
        check_rows(sizes["batch"], member.rows, member.samples, plan)
        step_input = StepInput(
            peer.device,
            plan.replica,
            manifest.cut,
            manifest.codec,
            Batch.of(message),
            weight=plan.weight_of(message) * member.counted / member.samples,
            length=sizes.get("seq", 1),
        )
        if not u_shaped:
            return self._batcher.put(self._pending(peer, message, step_input))
        if len(member.features) >= self._limits.window:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE,
                f"{len(member.features)} batches are without the gradient of their features; "
                "send these first",
                "batch",
            )
        effect = Effect()
        self._background.spawn(self._send_features(peer, message, step_input, sizes, effect))
        return effect

    async def _send_features(
        self,
        peer: Peer,
        message: Activations,
        step_input: StepInput,
        sizes: dict[str, int],
        effect: Effect,
    ) -> None:
        """Send back the output of the last block; keep the batch for the trunk's step."""
        manifest = self._manifests[peer.tier]
        shape = (sizes["batch"], sizes["seq"]) if manifest.task == "tokens" else (sizes["batch"],)
        step_input = replace(step_input, label_shape=shape, features=manifest.features)
        try:
            parts = await self._trunk.features(step_input)
        except Exception as error:
            self._failed(peer, error)
            return
        effect.complete()
        if not self._rounds.expects(peer.device, message.round):
            return
        if parts is None:
            self._refused(peer, "the activations are not finite")
            return
        self._members[peer.device].features[message.batch] = step_input, sizes
        self._post(peer, Features(round=message.round, batch=message.batch, parts=parts))

    def feature_gradient(self, peer: Peer, message: FeatureGradient) -> Effect | None:
        """Take the gradient of a batch's features: the trunk can make its step on the batch."""
        if not self._rounds.expects(peer.device, message.round):
            return None
        kept = self._members[peer.device].features.pop(message.batch, None)
        if kept is None:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"there are no features of a batch {message.batch}", "batch"
            )
        step_input, sizes = kept
        check_features(message.parts, message.labels, sizes, self._manifests[peer.tier])
        step_input = replace(step_input, head_gradient=HeadGradient.of(message))
        return self._batcher.put(self._pending(peer, message, step_input))

    def _pending(
        self, peer: Peer, message: Activations | FeatureGradient, step_input: StepInput
    ) -> PendingBatch:
        return PendingBatch(
            message.round,
            message.batch,
            step_input,
            reply=lambda gradient: self._post(peer, gradient),
            refuse=lambda reason: self._refused(peer, reason),
            give_up=lambda reason: self._rounds.drop(peer.device, reason),
        )

    def update(self, peer: Peer, message: Update) -> None:
        """Take a part of an update; the device has delivered once all parts are here."""
        if not self._rounds.expects(peer.device, message.round):
            return
        member = self._members[peer.device]
        wanted = self._wanted(self._manifests[peer.tier], member.plan)
        check_update(message, wanted, member.state, member.samples)
        member.state.update(message.tensors)
        if not message.done:
            return
        state = {n: t for n, t in member.state.items() if n not in member.plan.untrained}
        seconds = asyncio.get_running_loop().time() - self._began
        metrics = checked_metrics(message.metrics, seconds)
        update = DeviceUpdate(peer.device, state, member.counted, metrics)
        self._updates[peer.device] = update
        self._rounds.deliver(peer.device, asyncio.get_running_loop().time())

    def _wanted(self, manifest: Manifest, plan: DevicePlan) -> list[TensorSpec]:
        """The tensors of a whole update: the tier's state, or that of each base network."""
        specs = manifest.exchanged(self._keeps_slots)
        if plan.bases is None:
            return list(specs)
        return [replace(s, name=tensor_of(base, s.name)) for base in plan.bases for s in specs]
