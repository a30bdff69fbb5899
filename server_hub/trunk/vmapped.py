"""The trunk of several base networks: one step trains all of them, without a loop over them.

Their tensors are stacked, (bases, ...), and ``torch.vmap`` makes one batched step of loss, gradient
and optimizer. What has arrived for each base is filled up to equally many rows with rows that do
not count, so a model must treat its rows one by one: there are no batch norms above a cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.protocol.tensors import Array
from export.dual_norm import has_dual_norms, noise_tensors
from export.losses import NO_LABEL
from export.names import layer_of
from export.optimizers import get_optimizer
from export.packing import get_codec
from export.split import SplitModel
from server_hub.trunk.depth_merge import Entering, depth_merged_loss
from server_hub.trunk.interface import Arrival, State, StepReport, TrunkCopy, TrunkPlan


@dataclass(frozen=True)
class _Unpacked:
    """An arrival on the trunk's device; ``counted`` says how many labels count."""

    source: Arrival
    number: int
    h: Tensor
    labels: Tensor
    counted: int


@dataclass(frozen=True)
class _Step:
    """What a step makes of some bases, each tensor (bases, ...)."""

    parameters: dict[str, Tensor]
    slots: dict[str, Tensor]
    losses: Tensor
    row_losses: Tensor
    finite: Tensor


class StackedTrunk:
    """Trains the deep part of several base networks for one round.

    Args:
        template: one of them; of its own tensors those that are frozen are used.
        state: what is trained, each tensor (bases, ...).
        plan: how.
        device: torch device.
    """

    def __init__(
        self, template: SplitModel, state: State, plan: TrunkPlan, device: torch.device
    ) -> None:
        model = copy.deepcopy(template).to(device).train()
        self._plan, self._device, self._model = plan, device, model
        self._loss = _Loss(model)
        self._dual = has_dual_norms(model)
        noise = noise_tensors(model)
        tensors = {n: torch.from_numpy(np.array(t)).to(device) for n, t in state.items()}
        # the stem is trained where it is: on the devices
        own = {n for n, p in model.named_parameters() if p.requires_grad and layer_of(n) != "stem"}
        self._parameters = {n: t for n, t in tensors.items() if n in own}
        self._resting = {n: t for n, t in tensors.items() if n not in own}
        self._noise = noise & own
        self._rule = get_optimizer(plan.optimizer)
        single = self._rule.slots({n: t[0] for n, t in self._parameters.items()})
        self._slots = {
            n: s.expand(plan.bases, *s.shape).clone() for n, s in single.items()
        }  # fmt: skip
        self._hyper = {n: torch.tensor(v, device=device) for n, v in plan.hyper.items()}
        self._samples: dict[tuple[int, str], int] = {}
        self._hardened: set[int] = set()

    def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        """One step of every base that something has arrived for.

        Arrivals that are not finite, or make the loss so, are refused.
        """
        refused: dict[str, str] = {}
        losses: list[tuple[float, int] | None] = [None] * len(arrivals)
        groups: dict[int, list[_Unpacked]] = {}
        for number, arrival in enumerate(arrivals):
            unpacked = self._unpack(number, arrival)
            if torch.isfinite(unpacked.h).all():
                groups.setdefault(arrival.base, []).append(unpacked)
            else:
                refused[arrival.device] = "the activations are not finite"
        while groups:
            step = self._train(groups)
            self._take(step, groups)
            self._note_losses(step, groups, losses)
            wrong = [b for b, fine in zip(groups, step.finite.tolist(), strict=True) if not fine]
            groups = {base: self._without_culprits(groups[base], refused) for base in wrong}
            groups = {base: group for base, group in groups.items() if group}
        used = [found for found in losses if found is not None]
        rows = sum(count for _, count in used)
        loss = sum(total for total, _ in used) / rows if rows else math.nan
        return StepReport(loss, rows, refused, (), losses)

    def finish(self) -> list[TrunkCopy]:
        """Every layer that was trained, of every base."""
        copies = []
        for (base, layer), samples in self._samples.items():
            tensors = {
                n: t[base].cpu().numpy() for n, t in self._parameters.items()
                if layer_of(n) == layer and (n not in self._noise or base in self._hardened)
            }  # fmt: skip
            if tensors:
                copies.append(TrunkCopy("bases", layer, tensors, samples, base))
        return copies

    def _unpack(self, number: int, arrival: Arrival) -> _Unpacked:
        parts = {name: self._move(part) for name, part in arrival.parts.items()}
        assert arrival.labels is not None
        counted = int((arrival.labels >= 0).sum())
        h = get_codec(arrival.codec).unpack(parts)
        return _Unpacked(arrival, number, h, self._move(arrival.labels), counted)

    def _move(self, array: Array) -> Tensor:
        return torch.from_numpy(np.require(array, requirements="W")).to(self._device)

    def _train(self, groups: Mapping[int, Sequence[_Unpacked]]) -> _Step:
        """Loss, gradients and update of the bases in the groups, in one pass."""
        chosen = torch.tensor(list(groups), device=self._device)

        def some(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[chosen] for name, tensor in tensors.items()}

        def one(
            parameters: dict[str, Tensor],
            resting: dict[str, Tensor],
            slots: dict[str, Tensor],
            entering: dict[int, dict[str, Tensor]],
        ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor, Tensor]:
            rows = {cut: [Entering(**fields)] for cut, fields in entering.items()}

            def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                given = {f"model.{n}": t for n, t in (parameters | resting).items()}
                loss, row_losses = functional_call(self._loss, given, (rows,))
                return loss, (loss, row_losses)

            gradients, (loss, row_losses) = grad(loss_of, has_aux=True)(parameters)
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            scale = (self._plan.max_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {n: g * scale for n, g in gradients.items()}
            stepped, moved = self._rule.step(parameters, gradients, slots, self._hyper)
            return stepped, moved, loss, row_losses, torch.isfinite(loss) & torch.isfinite(norm)

        batched = torch.vmap(one, randomness="different")
        entering = self._stack(groups)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for several networks
            return _Step(
                *batched(some(self._parameters), some(self._resting), some(self._slots), entering)
            )

    def _stack(self, groups: Mapping[int, Sequence[_Unpacked]]) -> dict[int, dict[str, Tensor]]:
        """What enters at each cut, (bases, rows, ...), filled up with rows that do not count."""
        cuts = sorted({u.source.cut for group in groups.values() for u in group})
        return {cut: self._stack_cut(cut, groups) for cut in cuts}

    def _stack_cut(self, cut: int, groups: Mapping[int, Sequence[_Unpacked]]) -> dict[str, Tensor]:
        at = {b: [u for u in group if u.source.cut == cut] for b, group in groups.items()}
        rows = max(sum(u.source.rows for u in group) for group in at.values())
        like = next(u for group in at.values() for u in group)
        lengths = [u.h.shape[1] for group in at.values() for u in group]
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
        if like.source.present is not None:
            fields["present"] = h.new_ones(bases, rows, len(like.source.present))
        if self._dual:
            fields["noise"] = h.new_zeros(bases, rows)
        for i, (base, group) in enumerate(at.items()):
            # clean rows weigh nothing where all is on hard ones, and these may come later
            total = sum(u.source.weight * u.counted for u in groups[base]) or 1.0
            row = 0
            for u in group:
                place = (i, slice(row, row + u.source.rows))
                where = (*place, slice(u.h.shape[1])) if texts else place
                h[where] = u.h
                fields["labels"][where] = u.labels
                fields["weights"][place] = u.source.weight / total
                if u.source.present is not None:
                    fields["present"][place] = self._move(u.source.present).to(h.dtype)
                if self._dual and u.source.noise:
                    fields["noise"][place] = 1.0
                row += u.source.rows
        return fields

    def _take(self, step: _Step, groups: Mapping[int, Sequence[_Unpacked]]) -> None:
        """Keep what was trained: where all is finite, of the layers that something has passed."""
        fine = {b for b, ok in zip(groups, step.finite.tolist(), strict=True) if ok}
        entered = {b: min(u.source.cut for u in group) for b, group in groups.items()}
        hard = {b for b, group in groups.items() if any(u.source.noise for u in group)}
        self._hardened |= hard & fine
        order = list(groups)

        def keep(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
            for name, tensor in theirs.items():
                noisy = name.rpartition("/")[2] in self._noise
                bases = [
                    b for b in fine
                    if _above(layer_of(name), entered[b]) and (not noisy or b in hard)
                ]  # fmt: skip
                if bases:
                    mine[name][bases] = tensor[[order.index(b) for b in bases]]

        keep(self._parameters, step.parameters)
        keep(self._slots, step.slots)
        for base in fine:
            for u in groups[base]:
                if u.source.noise:  # the same examples once more
                    continue
                for layer in self._layers_above(u.source.cut):
                    self._samples[base, layer] = self._samples.get((base, layer), 0) + u.source.rows

    def _layers_above(self, cut: int) -> list[str]:
        return [layer for layer in self._model.layers() if _above(layer, cut)]

    def _note_losses(
        self,
        step: _Step,
        groups: Mapping[int, Sequence[_Unpacked]],
        losses: list[tuple[float, int] | None],
    ) -> None:
        """The loss of each arrival, by its number: sum over its labels that count, and how many."""
        cuts = sorted({u.source.cut for group in groups.values() for u in group})
        most = {
            cut: max(sum(u.source.rows for u in g if u.source.cut == cut) for g in groups.values())
            for cut in cuts
        }
        for i, group in enumerate(groups.values()):
            if not step.finite[i]:
                continue
            first = 0
            for cut in cuts:
                row = first
                for u in (u for u in group if u.source.cut == cut):
                    total = float(step.row_losses[i, row : row + u.source.rows].sum())
                    losses[u.number] = total, u.counted
                    row += u.source.rows
                first += most[cut]

    def _without_culprits(self, group: list[_Unpacked], refused: dict[str, str]) -> list[_Unpacked]:
        """Those of a base's arrivals whose loss is finite when they are alone."""
        fine = [bool(self._train({u.source.base: [u]}).finite[0]) for u in group]
        if all(fine):  # finite alone, not together: too large for all of them
            fine = [False] * len(group)
        for u, kept in zip(group, fine, strict=True):
            if not kept:
                refused[u.source.device] = "the activations make the loss overflow"
        return [u for u, kept in zip(group, fine, strict=True) if kept]


class _Loss(nn.Module):
    """The merged loss as a module, for ``functional_call``."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, entering: Mapping[int, Sequence[Entering]]) -> tuple[Tensor, Tensor]:
        """See :func:`server_hub.trunk.depth_merge.depth_merged_loss`."""
        return depth_merged_loss(self.model, entering)


def _above(layer: str, cut: int) -> bool:
    """Whether a layer lies above a cut: on the hub."""
    kind, _, depth = layer.partition(".")
    return kind == "head" or (kind == "block" and int(depth) >= cut) or (
        kind == "aux" and int(depth) > cut
    )  # fmt: skip
