"""Training of the trunk: one depth-merged step serves all devices.

:mod:`server_hub.trunk.depth_merge` is the pass over the blocks; this module takes batches in,
makes the optimizer's step, and refuses batches that would make the model's weights non-finite. A
step that raises is divided until it fits, or until the batch to blame is found. Nothing of an
attempt that failed is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.protocol.tensors import Array, State
from export.cutting.split_model import SplitModel
from export.cutting.tied import tied_tensors
from export.packing.codecs import get_codec
from server_hub.trunk.bounds import ActivationBound, GradientBound
from server_hub.trunk.depth_merge import Entering, depth_merged_loss, merged_features
from server_hub.trunk.errors import TrunkDamaged, TrunkRefused, divided, is_damage, reason_of
from server_hub.trunk.interface import StepInput, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.models import ModelPool, to_device, to_device_by_name
from server_hub.trunk.replica import Replica
from server_hub.trunk.step_batches import (
    Received,
    Unpacked,
    counted_labels,
    is_finite,
    label_weights,
    loss_sums,
    merged_order,
    rows_by_cut,
)
from server_hub.trunk.step_size import StepBounds, StepSize, bucket
from server_hub.trunk.vmapped import VmappedTrainer


@dataclass(frozen=True)
class _Outcome:
    """What the host reads of a backward pass, all at once.

    Attributes:
        finite: whether loss and gradients are finite, and batch statistics within bounds.
        losses: for each batch, the sum of the loss over its labels; NaN where they are elsewhere.
    """

    finite: bool
    losses: list[float]


class _TooLargeTogether(Exception):
    """A step overflows on batches that are fine alone; it has to be divided."""


class TrunkTrainer:
    """Trains the trunk, without processes or waiting.

    Args:
        model: the model; its own trained tensors are not used.
        device: torch device to train on.
    """

    def __init__(self, model: SplitModel, device: str) -> None:
        self._pool = ModelPool(model, device)
        self._device = self._pool.device
        self._tied = tied_tensors(self._pool.template)
        self._state: State = {}
        self._plan = TrunkPlan("sgd", {})
        self._replicas: dict[str, Replica] = {}
        self._kept: list[Received] = []
        self._vmapped: VmappedTrainer | None = None
        self._activations = ActivationBound(self._device)
        self._gradients = GradientBound(self._device)

    def begin(self, state: State, plan: TrunkPlan) -> None:
        """Start a round from ``state``, with no replicas and fresh optimizers."""
        self._state, self._plan = state, plan
        self._drop_replicas()
        self._kept.clear()
        self._vmapped = None
        self._activations.begin()
        self._gradients.begin()
        if plan.bases:
            self._vmapped = VmappedTrainer(
                self._pool.template, state, plan, self._device, self._activations
            )

    def step(self, inputs: Sequence[StepInput]) -> StepReport:
        """Make one depth-merged step per replica; refuse batches that it cannot be made with."""
        if self._vmapped is not None:
            return self._vmapped.step(inputs)
        received: list[Received | None] = [None] * len(inputs)
        refused: dict[str, str] = {}

        def receive(places: Sequence[int]) -> None:
            moved = self._receive([inputs[i] for i in places])
            for i, batch in zip(places, moved, strict=True):
                received[i] = batch

        def refuse(i: int, reason: str) -> None:
            refused[inputs[i].device] = reason

        if inputs:
            divided(receive, range(len(inputs)), refuse)
        if self._plan.epochs > 1:
            self._kept.extend(r for r in received if r is not None)
        return self._train(received, refused)

    @torch.no_grad()
    def features(self, step_input: StepInput) -> dict[str, Array] | None:
        """Packed output of the last block for a batch; None if it is not finite.

        :meth:`step` computes it again, with the parameters of that moment; it also updates the
        batch statistics, which this leaves as they are.

        Raises:
            TrunkRefused: the output of this batch cannot be computed.
        """
        replica = self._replica(step_input.replica)
        codec = get_codec(step_input.codec)
        before = replica.statistics()
        try:
            h = codec.unpack(to_device_by_name(step_input.batch.parts, self._device))
            h = self._activations.shortened([(step_input.device, step_input.cut, 0)], [h])[0]
            h = self._merged_features(replica, {step_input.cut: [h]})
            if not torch.isfinite(h).all():
                return None
            shapes = {spec.name: spec.shape for spec in step_input.features}
            parts = codec.pack_as(h, shapes)
            return {name: part.cpu().numpy() for name, part in parts.items()}
        except Exception as error:
            if is_damage(error):
                raise
            raise TrunkRefused(reason_of(error)) from error
        finally:
            replica.restore(before)

    @property
    def keeps_memory(self) -> bool:
        """Whether the arrays of a batch must stay as they are after :meth:`step`."""
        return self._plan.epochs > 1 and self._device.type == "cpu"

    def finish(self) -> list[TrunkCopy]:
        """Make the passes after the first, over shuffled batches; return what was trained."""
        if self._vmapped is not None:
            return self._vmapped.finish()
        rng = np.random.default_rng(self._plan.seed)
        for done in range(1, self._plan.epochs):
            if self._plan.anneal:
                for replica in self._replicas.values():
                    replica.set_rate(0.5 * (1 + math.cos(math.pi * done / self._plan.epochs)))
            for group in self._groups(rng.permutation(len(self._kept))):
                self._train(group, {})
        self._kept.clear()
        copies = [copy for name, r in self._replicas.items() for copy in r.copies(name)]
        self._drop_replicas()
        return copies

    # --- batches --------------------------------------------------------------------------------

    def _receive(self, inputs: Sequence[StepInput]) -> list[Received]:
        """Move batches to the trunk's device, all of them in one copy."""
        arrays: list[Array] = []
        for i in inputs:
            arrays.extend(i.batch.parts.values())
            if i.batch.labels is not None:
                arrays.append(i.batch.labels)
            if i.head_gradient is not None:
                arrays.extend(i.head_gradient.parts.values())
        moved = iter(to_device(arrays, self._device))
        received = []
        for i in inputs:
            parts = {name: next(moved) for name in i.batch.parts}
            labels, gradient = torch.empty(0), None
            if i.batch.labels is not None:
                labels, counted = next(moved), int((i.batch.labels >= 0).sum())
            if i.head_gradient is not None:
                gradient = {name: next(moved) for name in i.head_gradient.parts}
                counted = i.head_gradient.labels
            received.append(Received(i, parts, labels, counted, gradient))
        return received

    def _groups(self, order: Array) -> Iterator[list[Received]]:
        """Batches kept for later passes, in groups of one bucket of lengths, within bounds."""
        plan = self._plan
        bounds = StepBounds(plan.max_rows, plan.max_tokens, plan.max_bytes)
        buckets: dict[int, list[Received]] = {}
        for i in order:
            buckets.setdefault(bucket(self._kept[i].source.length), []).append(self._kept[i])
        for batches in buckets.values():
            group: list[Received] = []
            size = StepSize()
            for batch in batches:
                if group and not bounds.allow(size.plus(batch.source)):
                    yield group
                    size, group = StepSize(), []
                group.append(batch)
                size = size.plus(batch.source)
            yield group

    # --- steps ----------------------------------------------------------------------------------

    def _train(self, received: Sequence[Received | None], refused: dict[str, str]) -> StepReport:
        """One step of every replica that a batch is for; None stands for a refused batch."""
        gradients: dict[int, Mapping[str, Array]] = {}
        losses: dict[int, tuple[float, int]] = {}
        total, rows = 0.0, 0
        given = [r for r in received if r is not None]
        for name in dict.fromkeys(r.source.replica for r in given):
            replica = self._replica(name)

            def work(some: Sequence[Received], replica: Replica = replica) -> None:
                nonlocal total, rows
                loss, used = self._train_replica(replica, some, refused, gradients, losses)
                total += loss
                rows += used

            def refuse(batch: Received, reason: str) -> None:
                refused[batch.source.device] = reason
                gradients.pop(id(batch), None)

            divided(work, [r for r in given if r.source.replica == name], refuse)
        returned = [gradients.get(id(r)) for r in received] if self._plan.returned else []
        each = [losses.get(id(r)) for r in received]
        diverged = [r.source.device for r in given if self._replica(r.source.replica).diverged]
        mean = total / rows if rows else math.nan
        return StepReport(mean, rows, refused, returned, each, diverged)

    def _train_replica(
        self,
        replica: Replica,
        received: Sequence[Received],
        refused: dict[str, str],
        gradients: dict[int, Mapping[str, Array]],
        losses: dict[int, tuple[float, int]],
    ) -> tuple[float, int]:
        """Step one replica; return the sum of the loss over the labels used, and their number.

        When loss or gradients are not finite, or batch statistics out of bounds, nothing is
        changed: each batch is tried alone to find the ones to blame, and the step is repeated with
        the others. Nothing is changed either when an exception is raised. A replica whose
        parameters have grown out of all bounds is to blame itself, and makes no further steps.

        Args:
            replica: the replica.
            received: its batches.
            refused: takes the reason, by device whose batch is refused.
            gradients: takes the packed gradient of each batch, by the batch's ``id``.
            losses: takes loss and number of labels of each batch, by the batch's ``id``.

        Raises:
            TrunkDamaged: the optimizer failed halfway.
        """
        with replica.attempt() as before:
            batches = [self._unpack(r) for r in received]
            while batches and not replica.diverged:
                outcome = self._backward(replica, batches)
                if outcome.finite:
                    if self._plan.returned:
                        weights, labels = label_weights(batches)
                        for b, weight in zip(batches, weights, strict=True):
                            gradients[id(b.received)] = self._packed_gradient(b, weight, labels)
                    for b, loss in zip(batches, outcome.losses, strict=True):
                        if b.received.head_gradient is None:
                            losses[id(b.received)] = loss, b.received.counted
                    try:
                        replica.optimizer.step()
                    except Exception as error:  # some parameters may have moved already
                        raise TrunkDamaged(f"the optimizer failed: {reason_of(error)}") from error
                    self._activations.keep()
                    self._gradients.keep()
                    replica.count(rows_by_cut(batches))
                    return sum(outcome.losses), counted_labels(batches)
                replica.restore(before)
                fine = torch.stack([is_finite(b) for b in batches]).tolist()
                reason = "the activations are not finite"
                if all(fine) and replica.has_diverged():
                    replica.diverged = True  # by training, not by these batches
                    break
                if batches[0].gradient is not None:
                    reason = "the activations, or the gradients of their features, are not finite"
                if all(fine):
                    fine = [self._finite_alone(replica, b, before) for b in batches]
                    if all(fine):
                        raise _TooLargeTogether("each batch is finite alone, all together are not")
                    reason = "the activations make the loss overflow, or the batch statistics"
                refused |= {
                    b.source.device: reason for b, ok in zip(batches, fine, strict=True) if not ok
                }
                batches = [b for b, ok in zip(batches, fine, strict=True) if ok]
        return 0.0, 0

    def _unpack(self, received: Received) -> Unpacked:
        codec = get_codec(received.source.codec)
        h = codec.unpack(received.parts).requires_grad_(self._plan.returned)
        given = received.head_gradient
        return Unpacked(received, h, None if given is None else codec.unpack(given))

    def _finite_alone(
        self, replica: Replica, batch: Unpacked, before: Mapping[str, Tensor]
    ) -> bool:
        outcome = self._backward(replica, [batch])
        replica.restore(before)
        return outcome.finite

    def _backward(self, replica: Replica, batches: Sequence[Unpacked]) -> _Outcome:
        """Backward pass of the merged loss, gradients clipped; the host waits once, at the end."""
        replica.optimizer.zero_grad()
        for b in batches:
            b.h.grad = None
        if batches[0].gradient is None:
            loss, row_losses = self._loss(replica, batches)
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            loss, row_losses = torch.zeros((), device=self._device), None
            self._backward_from_features(replica, batches)
        finite = torch.isfinite(loss + self._clip(replica)) & replica.statistics_are_sane()
        if row_losses is None:
            return _Outcome(bool(finite), [math.nan] * len(batches))
        values = torch.cat([finite[None], row_losses]).cpu().numpy().astype(np.float64)
        return _Outcome(bool(values[0]), loss_sums(values[1:], batches))

    def _loss(self, replica: Replica, batches: Sequence[Unpacked]) -> tuple[Tensor, Tensor]:
        """The merged loss, and the unweighted loss of each row in the merged order (rows,)."""
        each, labels = label_weights(batches)
        weights = torch.from_numpy(
            np.repeat(np.array([w / labels for w in each]), [b.source.rows for b in batches])
        ).to(self._device, batches[0].h.dtype, non_blocking=True)
        entering: dict[int, list[Entering]] = {}
        own = torch.split(weights, [b.source.rows for b in batches])
        for b, h, weight in zip(batches, self._shortened(batches), own, strict=True):
            entering.setdefault(b.source.cut, []).append(Entering(h, b.received.labels, weight))
        with self._autocast():
            return depth_merged_loss(replica.model, entering, auxiliary=not self._plan.returned)

    def _backward_from_features(self, replica: Replica, batches: Sequence[Unpacked]) -> None:
        """Backward pass from the gradients of the features, which the devices have sent."""
        entering: dict[int, list[Tensor]] = {}
        for b, h in zip(batches, self._shortened(batches), strict=True):
            entering.setdefault(b.source.cut, []).append(h)
        merged = self._merged_features(replica, entering)
        bounded = self._gradients.shortened_gradients(
            [b.source.device for b in batches],
            [b.gradient for b in batches if b.gradient is not None],
            [b.received.counted for b in batches],
        )
        weights, labels = label_weights(batches)
        gradient, row = torch.zeros_like(merged), 0
        for i in merged_order(batches):
            b = batches[i]
            own = bounded[i] * (weights[i] * b.received.counted / labels)
            rows = gradient[row : row + b.source.rows]
            # a text may have been padded: no gradient comes back for positions it did not have
            (rows[:, : own.shape[1]] if own.dim() == 3 else rows).copy_(own)
            row += b.source.rows
        merged.backward(gradient)  # type: ignore[no-untyped-call]

    def _shortened(self, batches: Sequence[Unpacked]) -> list[Tensor]:
        """Activations of the batches, with rows that are far too long shortened."""
        entries = [(b.source.device, b.source.cut, 0) for b in batches]
        return self._activations.shortened(entries, [b.h for b in batches])

    def _merged_features(self, replica: Replica, entering: Mapping[int, list[Tensor]]) -> Tensor:
        """Output of the last block, in the dtype of the weights."""
        with self._autocast():
            h = merged_features(replica.model, entering)
        return h.float() if self._plan.precision == "bf16" else h

    def _clip(self, replica: Replica) -> Tensor:
        """Scale the gradients down to the largest norm allowed; return the norm before."""
        trained = [p for p in replica.trained if p.grad is not None]
        norm: Tensor = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        nn.utils.clip_grads_with_norm_(trained, self._plan.max_norm, norm)
        return norm.to(self._device)

    def _autocast(self) -> AbstractContextManager[object]:
        on = self._plan.precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=on)

    def _packed_gradient(
        self, batch: Unpacked, weight: float, labels: float
    ) -> Mapping[str, Array]:
        """Gradient at the cut of the mean over the batch's own labels, not over all ``labels``."""
        assert batch.h.grad is not None
        own = batch.h.grad * (labels / (batch.received.counted * weight))
        shapes = {name: part.shape for name, part in batch.received.parts.items()}
        parts = get_codec(batch.source.codec).pack_as(own, shapes)
        return {name: part.cpu().numpy() for name, part in parts.items()}

    # --- replicas -------------------------------------------------------------------------------

    def _replica(self, name: str) -> Replica:
        if name not in self._replicas:
            model = self._pool.take(self._state)
            self._replicas[name] = Replica(model, self._state, self._plan, self._tied)
        return self._replicas[name]

    def _drop_replicas(self) -> None:
        self._pool.give_back([replica.model for replica in self._replicas.values()])
        self._replicas.clear()
