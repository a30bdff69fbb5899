"""Steps of the trunk: one serves all devices, see :mod:`server_hub.trunk.depth_merge`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from edge_sdk.protocol.tensors import Array
from export.names import layer_of
from export.optimizers import get_optimizer
from export.packing import get_codec
from export.split import SplitModel, channel_axis
from server_hub.trunk.depth_merge import Entering, depth_merged_loss, merged_features
from server_hub.trunk.evaluator import Served
from server_hub.trunk.interface import Arrival, State, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.vmapped import StackedTrunk


@dataclass
class _Replica:
    """One copy of the trunk and its optimizer; ``samples`` counts the rows through each layer."""

    model: SplitModel
    optimizer: torch.optim.Optimizer
    samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Packed:
    """An arrival on the trunk's device, still packed; ``counted`` says how many labels count.

    The source's arrays may be in memory that holds others by the time of later passes.
    """

    source: Arrival
    parts: dict[str, Tensor]
    labels: Tensor
    counted: int
    gradient: Tensor | None


class TrunkCore(Served):
    """The arithmetic of the trunk, without processes or waiting.

    Args:
        model: the model; its own weights are not used.
        device: torch device to train on.
        held_out: examples for :meth:`evaluate`, ``(x, y)``.
    """

    def __init__(
        self, model: SplitModel, device: str, held_out: tuple[Array, Array] | None = None
    ) -> None:
        super().__init__(model, device, held_out)
        self._state: State = {}
        self._plan = TrunkPlan("sgd", {})
        self._replicas: dict[str, _Replica] = {}
        self._kept: list[_Packed] = []
        self._stacked: StackedTrunk | None = None

    def begin(self, state: State, plan: TrunkPlan) -> None:
        """Start a round from ``state``."""
        self._state, self._plan = state, plan
        self._replicas.clear()
        self._kept.clear()
        self._stacked = (
            StackedTrunk(self._template, state, plan, self.device) if plan.bases else None
        )

    def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        """One depth-merged step per replica; arrivals that are not finite are refused."""
        if self._stacked is not None:
            return self._stacked.step(arrivals)
        packed = [self._receive(arrival) for arrival in arrivals]
        if self._plan.epochs > 1:
            self._kept.extend(packed)
        return self._train(packed)

    @torch.no_grad()
    def features(self, arrival: Arrival) -> dict[str, Array] | None:
        """What leaves the last block for activations, packed as they are; None if not finite.

        :meth:`step` computes it again, with the parameters that there are then.
        """
        replica = self._replicas.get(arrival.replica) or self._new_replica(arrival.replica)
        codec = get_codec(arrival.codec)
        h = codec.unpack({name: self._move(part) for name, part in arrival.parts.items()})
        h = merged_features(replica.model, {arrival.cut: [h]})
        if not torch.isfinite(h).all():
            return None
        parts = codec.pack(h, channel_axis(h, self._template.channels_first))
        return {name: part.cpu().numpy() for name, part in parts.items()}

    @property
    def keeps_memory(self) -> bool:
        """Whether arrivals must stay where they are after :meth:`step`, for later passes."""
        return self._plan.epochs > 1 and self.device.type == "cpu"

    def finish(self) -> list[TrunkCopy]:
        """The passes after the first, over shuffled arrivals; then what was trained."""
        if self._stacked is not None:
            return self._stacked.finish()
        rng = np.random.default_rng(self._plan.seed)
        for done in range(1, self._plan.epochs):
            if self._plan.anneal:
                self._set_rate(0.5 * (1 + math.cos(math.pi * done / self._plan.epochs)))
            rows = 0
            group: list[_Packed] = []
            for i in rng.permutation(len(self._kept)):
                if group and rows + self._kept[i].source.rows > self._plan.max_rows:
                    self._train(group)
                    rows, group = 0, []
                group.append(self._kept[i])
                rows += self._kept[i].source.rows
            if group:
                self._train(group)
        self._kept.clear()
        copies = []
        for name, replica in self._replicas.items():
            trained = replica.model.trained()
            if self._plan.keeps_slots:
                trained |= self._slots(replica)
            for layer, rows in replica.samples.items():
                tensors = {
                    n: t.detach().cpu().numpy() for n, t in trained.items()
                    if layer_of(n) == layer
                }  # fmt: skip
                if tensors:  # a layer in which all is frozen has none
                    # an example counts once, however many passes there were
                    copies.append(TrunkCopy(name, layer, tensors, rows // self._plan.epochs))
        self._replicas.clear()
        return copies

    def _set_rate(self, factor: float) -> None:
        for replica in self._replicas.values():
            for group in replica.optimizer.param_groups:
                group["lr"] = factor * self._plan.hyper["lr"]

    def _receive(self, arrival: Arrival) -> _Packed:
        parts = {name: self._move(part) for name, part in arrival.parts.items()}
        if arrival.labels is not None:
            counted = int((arrival.labels >= 0).sum())
            return _Packed(arrival, parts, self._move(arrival.labels), counted, None)
        assert arrival.finished is not None
        back = {name: self._move(part) for name, part in arrival.finished.gradient.items()}
        gradient = get_codec(arrival.codec).unpack(back)
        return _Packed(arrival, parts, torch.empty(0), arrival.finished.labels, gradient)

    def _train(self, packed: Sequence[_Packed]) -> StepReport:
        refused: dict[str, str] = {}
        gradients: dict[int, Mapping[str, Array]] = {}
        losses: dict[int, tuple[float, int]] = {}
        total, rows = 0.0, 0
        for name in {p.source.replica: None for p in packed}:
            mine = [p for p in packed if p.source.replica == name]
            replica = self._replicas.get(name) or self._new_replica(name)
            loss, used = self._train_replica(replica, mine, refused, gradients, losses)
            total += loss * used
            rows += used
        returned = [gradients.get(id(p)) for p in packed] if self._plan.returned else []
        each = [losses.get(id(p)) for p in packed]
        return StepReport(total / rows if rows else math.nan, rows, refused, returned, each)

    def _train_replica(
        self,
        replica: _Replica,
        packed: Sequence[_Packed],
        refused: dict[str, str],
        gradients: dict[int, Mapping[str, Array]],
        losses: dict[int, tuple[float, int]],
    ) -> tuple[float, int]:
        """Step one replica; returns mean loss and number of labels used.

        What is refused, and gradients to return and losses by the arrival's ``id``, are added to
        the dictionaries.

        When loss or gradient is not finite, each arrival is tried alone to find the ones to blame,
        and the step is repeated with the others.
        """
        unpacked = []
        for p in packed:
            h = get_codec(p.source.codec).unpack(p.parts)
            if not torch.isfinite(h).all():
                refused[p.source.device] = "the activations are not finite"
            else:
                unpacked.append((p, h.requires_grad_(self._plan.returned)))
        while unpacked:
            found, gradients_finite = self._gradients(replica, unpacked)
            if gradients_finite:
                for (p, _), loss in zip(unpacked, found, strict=True):
                    if p.gradient is None:
                        losses[id(p)] = loss, p.counted
                replica.optimizer.step()
                self._count(replica, unpacked)
                if self._plan.returned:
                    for p, h in unpacked:
                        gradients[id(p)] = self._pack_gradient(p, h, _counted(unpacked))
                return sum(found) / _counted(unpacked), _counted(unpacked)
            fine = [self._gradients(replica, [u])[1] for u in unpacked]
            if all(fine):  # finite alone, not together: too large for all of them
                fine = [False] * len(unpacked)
            for (p, _), kept in zip(unpacked, fine, strict=True):
                if not kept:
                    refused[p.source.device] = "the activations make the loss overflow"
            unpacked = [u for u, kept in zip(unpacked, fine, strict=True) if kept]
        return 0.0, 0

    def _gradients(
        self, replica: _Replica, unpacked: Sequence[tuple[_Packed, Tensor]]
    ) -> tuple[list[float], bool]:
        """Backward pass of the merged loss; each arrival's loss, and whether all is finite."""
        entering: dict[int, list[Entering]] = {}
        labels = _counted(unpacked)
        replica.optimizer.zero_grad()
        for _, h in unpacked:
            h.grad = None
        if unpacked[0][0].gradient is not None:
            finite = self._by_features(replica, unpacked)
            return [math.nan for _ in unpacked], finite
        for p, h in unpacked:
            weights = torch.full(
                (p.source.rows,), p.source.weight / labels, dtype=h.dtype, device=self.device
            )
            entering.setdefault(p.source.cut, []).append(Entering(h, p.labels, weights))
        loss, row_losses = depth_merged_loss(
            replica.model, entering, auxiliary=not self._plan.returned
        )
        if not torch.isfinite(loss):
            return [], False
        loss.backward()  # type: ignore[no-untyped-call]
        finite = self._clip(replica)
        order = _as_merged(unpacked)
        rows = [unpacked[i][0].source.rows for i in order]
        sums = [float(part.sum()) for part in torch.split(row_losses, rows)]
        return [sums[order.index(i)] for i in range(len(order))], finite

    def _by_features(self, replica: _Replica, unpacked: Sequence[tuple[_Packed, Tensor]]) -> bool:
        """Backward pass from gradients of the features; whether all is finite."""
        entering: dict[int, list[Tensor]] = {}
        for p, h in unpacked:
            entering.setdefault(p.source.cut, []).append(h)
        merged = merged_features(replica.model, entering)
        gradient, row = torch.zeros_like(merged), 0
        for p, _ in (unpacked[i] for i in _as_merged(unpacked)):
            assert p.gradient is not None
            rows = gradient[row : row + p.source.rows]
            own = p.gradient * (p.source.weight * p.counted / _counted(unpacked))
            # a text may have been padded: nothing comes back for what it did not have
            (rows[:, : own.shape[1]] if own.dim() == 3 else rows).copy_(own)
            row += p.source.rows
        merged.backward(gradient)  # type: ignore[no-untyped-call]
        return self._clip(replica)

    def _clip(self, replica: _Replica) -> bool:
        """Bound the gradients; whether they are finite."""
        trained = [p for p in replica.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        nn.utils.clip_grads_with_norm_(trained, self._plan.max_norm, norm)
        return bool(torch.isfinite(norm))

    def _pack_gradient(self, packed: _Packed, h: Tensor, labels: int) -> Mapping[str, Array]:
        """The gradient at the cut, of the mean over the arrival's labels, not the merged ones."""
        assert h.grad is not None
        own = h.grad * (labels / packed.counted)
        axis = channel_axis(h, self._template.channels_first)
        parts = get_codec(packed.source.codec).pack(own, axis)
        return {name: part.cpu().numpy() for name, part in parts.items()}

    def _count(self, replica: _Replica, unpacked: Iterable[tuple[_Packed, Tensor]]) -> None:
        model = replica.model
        for p, _ in unpacked:
            above = [f"block.{i}" for i in range(p.source.cut, model.depth)]
            if not self._plan.returned:
                above += [f"aux.{d}" for d in model.head_depths if d > p.source.cut]
            if p.gradient is None:
                above.append("head")
            for layer in above:
                replica.samples[layer] = replica.samples.get(layer, 0) + p.source.rows

    def _new_replica(self, name: str) -> _Replica:
        model = self._model_with(self._state)
        # a head may read the stem's table, but the stem is trained where it is: on the devices
        model.stem.requires_grad_(False)
        for module in model.modules() if self._plan.u_shaped else ():
            if isinstance(module, _DropoutNd):
                module.eval()
        rule = get_optimizer(self._plan.optimizer)
        trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        optimizer = rule.reference(trained, dict(self._plan.hyper))
        replica = self._replicas[name] = _Replica(model, optimizer)
        if self._plan.keeps_slots:
            for slots, slot, whose in self._slot_names(replica):
                slots[slot] = torch.from_numpy(np.array(self._state[whose]))
                if slot != "step":  # torch wants that one on the host
                    slots[slot] = slots[slot].to(self.device)
        return replica

    def _slots(self, replica: _Replica) -> dict[str, Tensor]:
        """The optimizer's slots, by the names that they have on devices."""
        return {whose: slots[slot] for slots, slot, whose in self._slot_names(replica)}

    def _slot_names(self, replica: _Replica) -> Iterator[tuple[dict[str, Tensor], str, str]]:
        """Of each slot: the dictionary that torch has it in, its name there, and our name."""
        ours = get_optimizer(self._plan.optimizer).torch_names
        for name, parameter in replica.model.named_parameters():
            if parameter.requires_grad:
                for kind, slot in ours.items():
                    whose = layer_of(name) if kind == "steps" else name
                    yield replica.optimizer.state[parameter], slot, f"{kind}/{whose}"


def _as_merged(unpacked: Sequence[tuple[_Packed, Tensor]]) -> list[int]:
    """The order in which arrivals' rows stand behind each other when they are merged."""
    return sorted(range(len(unpacked)), key=lambda i: unpacked[i][0].source.cut)


def _counted(unpacked: Iterable[tuple[_Packed, Tensor]]) -> int:
    return sum(p.counted for p, _ in unpacked)
