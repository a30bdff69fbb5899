"""Training of the trunk of several base networks: one step trains all of them, without a loop.

Their tensors are stacked, (bases, ...), and ``torch.vmap`` makes one batched step of loss, gradient
and optimizer. The batches of each base are filled up to the same number of rows with rows of
weight zero, so a model must treat its rows one by one: batch norms above a cut are not possible.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.protocol.tensors import Array, State
from export.bases.dual_norms import has_dual_norms, noise_tensors
from export.cutting.split_model import SplitModel
from export.cutting.tied import tied_tensors
from export.packing.codecs import get_codec
from export.steps.losses import NO_LABEL
from export.steps.optimizers import get_optimizer
from export.steps.weight_decay import decayed_names
from export.tensor_names import layer_of
from server_hub.trunk.bounds import ActivationBound, shares
from server_hub.trunk.depth_merge import Entering, depth_merged_loss
from server_hub.trunk.errors import divided
from server_hub.trunk.interface import StepInput, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.models import to_device


@dataclass(frozen=True)
class _Unpacked:
    """A batch on the trunk's device.

    Attributes:
        source: the batch as it came.
        number: its place among the inputs of the step.
        h: activations (rows, ...).
        labels: labels (rows,) or (rows, positions).
        present: (classes,) as in :class:`edge_sdk.protocol.messages.Batch`, or None.
        counted: number of labels that count.
    """

    source: StepInput
    number: int
    h: Tensor
    labels: Tensor
    present: Tensor | None
    counted: int


@dataclass(frozen=True)
class _Step:
    """Result of a step of some bases.

    Attributes:
        parameters: new parameters by name, each (bases, ...).
        slots: new optimizer slots by name, each (bases, ...).
        row_losses: unweighted loss of every row (bases, rows).
        finite: whether loss and gradients of a base are finite, by the base's place.
    """

    parameters: dict[str, Tensor]
    slots: dict[str, Tensor]
    row_losses: Array
    finite: list[bool]


class VmappedTrainer:
    """Trains the deep part of several base networks for one round.

    Args:
        template: one base network; of its own tensors only those that are frozen are used.
        state: the trained tensors by name, each (bases, ...).
        plan: how the round trains.
        device: torch device.
        activations: shortens rows of activations that are far too long; None for one that knows of
            no earlier rounds.
    """

    def __init__(
        self,
        template: SplitModel,
        state: State,
        plan: TrunkPlan,
        device: torch.device,
        activations: ActivationBound | None = None,
    ) -> None:
        model = copy.deepcopy(template).to(device).train()
        self._plan, self._device, self._model = plan, device, model
        self._loss = _Loss(model)
        self._activations = activations or ActivationBound(device)
        self._dual = has_dual_norms(model)
        noise = noise_tensors(model)
        tensors = {n: torch.from_numpy(np.array(t)).to(device) for n, t in state.items()}
        self._tied = tied_tensors(model)
        # the rest of the stem is trained on the devices
        own = {
            n for n, p in model.named_parameters()
            if p.requires_grad and (n in self._tied or layer_of(n) != "stem")
        }  # fmt: skip
        self._parameters = {n: t for n, t in tensors.items() if n in own}
        self._others = {n: t for n, t in tensors.items() if n not in own}
        self._noise = noise & own
        self._rule = get_optimizer(plan.optimizer)
        self._decayed = decayed_names(model, plan.decay) - set(self._tied)  # they decay on devices
        single = self._rule.slots({n: t[0] for n, t in self._parameters.items()})
        self._slots = {n: s.expand(plan.bases, *s.shape).clone() for n, s in single.items()}
        self._hyper = {n: torch.tensor(v, device=device) for n, v in plan.hyper.items()}
        self._samples: dict[tuple[int, str], int] = {}
        self._noise_trained: set[int] = set()

    def step(self, inputs: Sequence[StepInput]) -> StepReport:
        """One step of every base that a batch is for.

        Batches that are not finite, make the loss so, or make the step fail are refused.
        """
        refused: dict[str, str] = {}
        losses: list[tuple[float, int] | None] = [None] * len(inputs)
        batches: list[_Unpacked] = []

        def refuse(source: tuple[int, StepInput], reason: str) -> None:
            refused[source[1].device] = reason

        if inputs:
            divided(
                lambda some: batches.extend(self._unpack(some)), list(enumerate(inputs)), refuse
            )
        flags = [torch.isfinite(b.h).all() for b in batches]
        fine = torch.stack(flags).tolist() if flags else []
        good = [b for b, finite in zip(batches, fine, strict=True) if finite]
        for b, finite in zip(batches, fine, strict=True):
            if not finite:
                refused[b.source.device] = "the activations are not finite"
        self._step_on(self._shortened(good), refused, losses)
        used = [found for found in losses if found is not None]
        rows = sum(count for _, count in used)
        loss = sum(total for total, _ in used) / rows if rows else math.nan
        return StepReport(loss, rows, refused, (), losses)

    def _shortened(self, batches: Sequence[_Unpacked]) -> list[_Unpacked]:
        """The batches, with rows of activations that are far too long shortened."""
        entries = [(b.source.device, b.source.cut, b.source.batch.base) for b in batches]
        bounded = self._activations.shortened(entries, [b.h for b in batches])
        return [replace(b, h=h) for b, h in zip(batches, bounded, strict=True)]

    def finish(self) -> list[TrunkCopy]:
        """Every layer that was trained, of every base."""
        copies = []
        for (base, layer), samples in self._samples.items():
            part = layer == "stem"
            trained = base in self._noise_trained
            tensors = {
                n: t[base].to("cpu", copy=True).numpy()
                for n, t in self._parameters.items()
                if layer_of(n) == layer and (n not in self._noise or trained)
            }
            if tensors:
                copies.append(TrunkCopy("bases", layer, tensors, samples, base, part=part))
        return copies

    def _unpack(self, inputs: Sequence[tuple[int, StepInput]]) -> list[_Unpacked]:
        """Batches on the device, given each with its place among the inputs of the step."""
        arrays: list[Array] = []
        for _, i in inputs:
            assert i.batch.labels is not None
            arrays += [*i.batch.parts.values(), i.batch.labels]
            if i.batch.present is not None:
                arrays.append(i.batch.present)
        moved = iter(to_device(arrays, self._device))
        batches = []
        for number, i in inputs:
            h = get_codec(i.codec).unpack({name: next(moved) for name in i.batch.parts})
            labels = next(moved)
            present = None if i.batch.present is None else next(moved)
            assert i.batch.labels is not None
            counted = int((i.batch.labels >= 0).sum())
            batches.append(_Unpacked(i, number, h, labels, present, counted))
        return batches

    def _step_on(
        self,
        batches: Sequence[_Unpacked],
        refused: dict[str, str],
        losses: list[tuple[float, int] | None],
    ) -> None:
        """One step of every base that a batch is for; divided where it fails."""

        def work(batches: Sequence[_Unpacked]) -> None:
            groups: dict[int, list[_Unpacked]] = {}
            for b in batches:
                groups.setdefault(b.source.batch.base, []).append(b)
            step = self._train(groups)
            wrong = [b for b, ok in zip(groups, step.finite, strict=True) if not ok]
            again = [self._without_culprits(groups[base], refused) for base in wrong]
            # from here on nothing raises: what is kept is kept once
            self._keep(step, groups)
            self._activations.keep()
            self._note_losses(step, groups, losses)
            for group in again:
                self._step_on(group, refused, losses)

        def refuse(b: _Unpacked, reason: str) -> None:
            refused[b.source.device] = reason

        if batches:
            divided(work, batches, refuse)

    def _train(self, groups: Mapping[int, Sequence[_Unpacked]]) -> _Step:
        """Loss, gradients and update of the bases in ``groups``, in one pass."""
        chosen = torch.tensor(list(groups), device=self._device)

        def some(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[chosen] for name, tensor in tensors.items()}

        def one(
            parameters: dict[str, Tensor],
            others: dict[str, Tensor],
            slots: dict[str, Tensor],
            entering: dict[int, dict[str, Tensor]],
        ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
            rows = {cut: [Entering(**fields)] for cut, fields in entering.items()}

            def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                given = {f"model.{n}": t for n, t in (parameters | others).items()}
                loss, row_losses = functional_call(self._loss, given, (rows,))
                return loss, (loss, row_losses)

            gradients, (loss, row_losses) = grad(loss_of, has_aux=True)(parameters)
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            scale = (self._plan.max_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {n: g * scale for n, g in gradients.items()}
            stepped, moved = self._rule.step(
                parameters, gradients, slots, self._hyper, self._decayed
            )
            return stepped, moved, row_losses, torch.isfinite(loss) & torch.isfinite(norm)

        batched = torch.vmap(one, randomness="different")
        entering = self._stack(groups)
        on = self._plan.precision == "bf16"
        # fused attention has no rule for several networks
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(self._device.type, torch.bfloat16, enabled=on),
        ):
            parameters, slots, row_losses, finite = batched(
                some(self._parameters), some(self._others), some(self._slots), entering
            )
        # the host waits once, for both
        read = torch.cat([finite[:, None].double(), row_losses.double()], 1).cpu().numpy()
        return _Step(parameters, slots, read[:, 1:], [bool(v) for v in read[:, 0]])

    def _stack(self, groups: Mapping[int, Sequence[_Unpacked]]) -> dict[int, dict[str, Tensor]]:
        """Fields of :class:`Entering` by cut, (bases, rows, ...), filled up with weight zero."""
        cuts = sorted({b.source.cut for group in groups.values() for b in group})
        return {cut: self._stack_cut(cut, groups) for cut in cuts}

    def _stack_cut(self, cut: int, groups: Mapping[int, Sequence[_Unpacked]]) -> dict[str, Tensor]:
        at = {base: [b for b in group if b.source.cut == cut] for base, group in groups.items()}
        rows = max(sum(b.source.rows for b in group) for group in at.values())
        like = next(b for group in at.values() for b in group)
        lengths = [b.h.shape[1] for group in at.values() for b in group]
        texts = like.labels.dim() == 2
        inner = (max(lengths), *like.h.shape[2:]) if texts else like.h.shape[1:]
        bases = len(groups)
        h = like.h.new_zeros(bases, rows, *inner)
        fields = {
            "h": h,
            "labels": like.labels.new_full(
                (bases, rows, inner[0]) if texts else (bases, rows), NO_LABEL if texts else 0
            ),
            "weights": h.new_zeros(bases, rows),
        }
        if like.present is not None:
            fields["present"] = h.new_ones(bases, rows, len(like.present))
        if self._dual:
            fields["noise"] = h.new_zeros(bases, rows)
        for i, (base, group) in enumerate(at.items()):
            # clean rows weigh nothing where all weight is on adversarial ones, which come later
            weights = _weights(groups[base])
            total = sum(weights[b.number] * b.counted for b in groups[base]) or 1.0
            row = 0
            for b in group:
                place = (i, slice(row, row + b.source.rows))
                where = (*place, slice(b.h.shape[1])) if texts else place
                h[where] = b.h
                fields["labels"][where] = b.labels
                fields["weights"][place] = weights[b.number] / total
                if b.present is not None:
                    fields["present"][place] = b.present.to(h.dtype)
                if self._dual and b.source.batch.noise:
                    fields["noise"][place] = 1.0
                row += b.source.rows
        return fields

    def _keep(self, step: _Step, groups: Mapping[int, Sequence[_Unpacked]]) -> None:
        """Keep what was trained: of bases that are finite, the layers that rows have passed."""
        order = list(groups)
        fine = {base for base, ok in zip(groups, step.finite, strict=True) if ok}
        entered = {base: min(b.source.cut for b in group) for base, group in groups.items()}
        noisy = {base for base, g in groups.items() if any(b.source.batch.noise for b in g)}
        self._noise_trained |= noisy & fine

        def keep(mine: dict[str, Tensor], new: dict[str, Tensor]) -> None:
            for name, tensor in new.items():
                of_noise = name.rpartition("/")[2] in self._noise
                bases = [
                    base
                    for base in fine
                    if layer_of(name) in self._layers_above(entered[base])
                    and (not of_noise or base in noisy)
                ]
                if bases:
                    mine[name][bases] = tensor[[order.index(base) for base in bases]]

        keep(self._parameters, step.parameters)
        keep(self._slots, step.slots)
        for base in fine:
            for b in groups[base]:
                if b.source.batch.noise:  # adversarial versions of examples that count already
                    continue
                for layer in self._layers_above(b.source.cut):
                    self._samples[base, layer] = self._samples.get((base, layer), 0) + b.source.rows

    def _layers_above(self, cut: int) -> list[str]:
        """Layers that a row which enters at a cut trains; "stem" for tied tensors."""
        above = [layer for layer in self._model.layers() if _above(layer, cut)]
        return [*above, "stem"] if self._trains_stem(cut) else above

    def _trains_stem(self, cut: int) -> bool:
        """Whether a head above a cut reads a tied tensor."""
        return any(_above(head, cut) for heads in self._tied.values() for head in heads)

    def _note_losses(
        self,
        step: _Step,
        groups: Mapping[int, Sequence[_Unpacked]],
        losses: list[tuple[float, int] | None],
    ) -> None:
        """Put the loss of each batch, and its number of labels, into ``losses``."""
        cuts = sorted({b.source.cut for group in groups.values() for b in group})
        most = {
            cut: max(sum(b.source.rows for b in g if b.source.cut == cut) for g in groups.values())
            for cut in cuts
        }
        for i, group in enumerate(groups.values()):
            if not step.finite[i]:
                continue
            first = 0
            for cut in cuts:
                row = first
                for b in (b for b in group if b.source.cut == cut):
                    total = float(step.row_losses[i, row : row + b.source.rows].sum())
                    losses[b.number] = total, b.counted
                    row += b.source.rows
                first += most[cut]

    def _without_culprits(self, group: list[_Unpacked], refused: dict[str, str]) -> list[_Unpacked]:
        """Those of a base's batches whose loss is finite when they are alone."""
        fine = [self._train({b.source.batch.base: [b]}).finite[0] for b in group]
        if all(fine):  # finite alone, not together: too large for all of them
            fine = [False] * len(group)
        for b, kept in zip(group, fine, strict=True):
            if not kept:
                refused[b.source.device] = "the activations make the loss overflow"
        return [b for b, kept in zip(group, fine, strict=True) if kept]


class _Loss(nn.Module):
    """The merged loss as a module, for ``functional_call``."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, entering: Mapping[int, Sequence[Entering]]) -> tuple[Tensor, Tensor]:
        """See :func:`server_hub.trunk.depth_merge.depth_merged_loss`."""
        return depth_merged_loss(self.model, entering)


def _weights(batches: Sequence[_Unpacked]) -> dict[int, float]:
    """Weight of a label of each batch of one base in the step, by the batch's number."""
    devices = [b.source.device for b in batches]
    factors = shares(devices, [b.source.weight * b.counted for b in batches])
    return {b.number: f * b.source.weight for f, b in zip(factors, batches, strict=True)}


def _above(layer: str, cut: int) -> bool:
    """Whether a layer lies above a cut: on the hub."""
    kind, _, depth = layer.partition(".")
    return (
        kind == "head"
        or (kind == "block" and int(depth) >= cut)
        or (kind == "aux" and int(depth) > cut)
    )
