"""The trunk: depth-merged training of the deep part of the model.

Devices enter at different depths. One pass serves all of them: it walks the blocks upward and, at
each block, concatenates the activations that enter there with what comes from below::

    h = None
    for d in range(shallowest cut, N):
        h = concat(h, unpack(arrivals[d]));  h = blocks[d](h);  losses of the heads at d + 1
    loss(head(h)); one backward; one optimizer step

The batch grows with depth, and a row's weight is its device's own: the gradient is the sum of what
each arrival gives alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.tensors import Array
from export.optimizers import get_optimizer
from export.packing import get_codec
from export.split import SplitModel, channel_axis, layer_of

State = dict[str, Array]
"""Tensors by name, ``block.3.conv.weight``."""


@dataclass(frozen=True)
class Arrival:
    """Packed activations of one batch of one device.

    Attributes:
        device: who sent them.
        replica: which copy of the trunk they train.
        cut: block that they enter.
        codec: how they are packed.
        parts: the packed tensors.
        labels: (rows,) int64.
        weight: weight of a row in the loss.
    """

    device: str
    replica: str
    cut: int
    codec: str
    parts: Mapping[str, Array]
    labels: Array
    weight: float = 1.0

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(self.labels)


@dataclass(frozen=True)
class StepReport:
    """What one depth-merged step did.

    Attributes:
        loss: mean over the rows of the summed cross-entropy of the heads they passed; NaN if
            no row was used.
        rows: rows that were used.
        refused: devices whose activations were refused, with the reason.
        gradients: of each arrival, packed as it was, where the plan has them returned: the
            gradient of the mean loss over the arrival's rows. None for one that was refused.
    """

    loss: float
    rows: int
    refused: dict[str, str]
    gradients: Sequence[Mapping[str, Array] | None] = ()


@dataclass(frozen=True)
class TrunkCopy:
    """A layer as one replica of the trunk has trained it; ``samples`` passed through it."""

    replica: str
    layer: str
    tensors: State
    samples: int


@dataclass(frozen=True)
class TrunkPlan:
    """How the trunk trains in one round.

    Attributes:
        optimizer: ``sgd`` or ``adamw``.
        hyper: its hyper-parameters.
        epochs: passes over the round's activations; those after the first come at its end.
        max_rows: rows in one merged step at most.
        seed: order of the passes after the first.
        max_norm: gradients of a step are scaled down to this norm.
        returned: whether steps report the gradients of the arrivals.
        anneal: the learning rate goes to zero over the passes, by a cosine.
    """

    optimizer: str
    hyper: Mapping[str, float]
    epochs: int = 1
    max_rows: int = 256
    seed: int = 0
    max_norm: float = math.inf
    returned: bool = False
    anneal: bool = False


class Trunk(Protocol):
    """Trains the deep part. In this process (:class:`LocalTrunk`) or in one of its own."""

    async def start(self) -> None:
        """Make it ready; may take seconds."""

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        """Start a round from ``state``: no replicas yet, fresh optimizers."""

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        """One depth-merged step per replica over all arrivals."""

    async def finish(self) -> list[TrunkCopy]:
        """The passes that are left, then every layer that was trained."""

    async def serve(self, states: Mapping[int, State]) -> None:
        """The whole model's state by cut, to answer and to evaluate with."""

    async def answer(self, arrival: Arrival) -> Array:
        """Logits (heads, rows, classes) of the heads above the cut, the true head last."""

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        """Accuracy by tier (cut, codec) on the held-out examples, by path."""

    async def close(self) -> None:
        """Release everything."""


def depth_merged_loss(
    model: SplitModel,
    entering: Mapping[int, Sequence[tuple[Tensor, Tensor, Tensor]]],
) -> tuple[Tensor, Tensor]:
    """One pass over arrivals that enter at different depths.

    Args:
        model: blocks, auxiliary heads and head.
        entering: by cut, ``(h, labels, weights)`` of each arrival: activations (rows, ...),
            labels (rows,) and weight of each row (rows,).

    Returns:
        The loss: sum over rows of weight times summed cross-entropy of the heads above the cut;
        and the unweighted loss of each row, in the order of cut, then arrival.
    """
    h: Tensor | None = None
    labels = weights = row_losses = torch.empty(0)
    for depth in range(min(entering), model.depth):
        if new := entering.get(depth):
            fresh = [torch.cat([arrival[i] for arrival in new]) for i in range(3)]
            zeros = torch.zeros_like(fresh[2])
            if h is None:
                h, labels, weights, row_losses = fresh[0], fresh[1], fresh[2], zeros
            else:
                h = torch.cat([h, fresh[0]])
                labels = torch.cat([labels, fresh[1]])
                weights = torch.cat([weights, fresh[2]])
                row_losses = torch.cat([row_losses, zeros])
        h = model.block[depth](h)
        if str(depth + 1) in model.aux:
            logits = model.answer(depth + 1, h)
            row_losses = row_losses + cross_entropy(logits, labels, reduction="none")
    row_losses = row_losses + cross_entropy(model.head(h), labels, reduction="none")
    return (row_losses * weights).sum(), row_losses.detach()


@dataclass
class _Replica:
    """One copy of the trunk and its optimizer; ``samples`` counts the rows through each layer."""

    model: SplitModel
    optimizer: torch.optim.Optimizer
    samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Packed:
    """An arrival on the trunk's device, still packed."""

    source: Arrival
    parts: dict[str, Tensor]
    labels: Tensor


class TrunkCore:
    """The arithmetic of the trunk, without processes or waiting.

    Args:
        model: the model; its own weights are not used.
        device: torch device to train on.
        held_out: examples for :meth:`evaluate`, ``(x, y)``.
    """

    def __init__(
        self, model: SplitModel, device: str, held_out: tuple[Array, Array] | None = None
    ) -> None:
        self.device = torch.device(device)
        self._template = model.to(self.device)
        self._serving: dict[int, SplitModel] = {}
        self._state: State = {}
        self._plan = TrunkPlan("sgd", {})
        self._replicas: dict[str, _Replica] = {}
        self._kept: list[_Packed] = []
        self._held_out = held_out

    # --- training -------------------------------------------------------------------------------

    def begin(self, state: State, plan: TrunkPlan) -> None:
        """Start a round from ``state``."""
        self._state, self._plan = state, plan
        self._replicas.clear()
        self._kept.clear()

    def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        """One depth-merged step per replica; arrivals that are not finite are refused."""
        packed = [self._receive(arrival) for arrival in arrivals]
        if self._plan.epochs > 1:
            self._kept.extend(packed)
        return self._train(packed)

    @property
    def keeps_memory(self) -> bool:
        """Whether arrivals must stay where they are after :meth:`step`, for later passes."""
        return self._plan.epochs > 1 and self.device.type == "cpu"

    def finish(self) -> list[TrunkCopy]:
        """The passes after the first, over shuffled arrivals; then what was trained."""
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
            for layer, rows in replica.samples.items():
                tensors = {
                    n: t.detach().cpu().numpy() for n, t in trained.items()
                    if layer_of(n) == layer
                }  # fmt: skip
                # an example counts once, however many passes there were
                copies.append(TrunkCopy(name, layer, tensors, rows // self._plan.epochs))
        self._replicas.clear()
        return copies

    def _set_rate(self, factor: float) -> None:
        for replica in self._replicas.values():
            for group in replica.optimizer.param_groups:
                group["lr"] = factor * self._plan.hyper["lr"]

    def _receive(self, arrival: Arrival) -> _Packed:
        def move(array: Array) -> Tensor:  # torch warns of read-only memory; the worker's is not
            return torch.from_numpy(np.require(array, requirements="W")).to(self.device)

        parts = {name: move(part) for name, part in arrival.parts.items()}
        return _Packed(arrival, parts, move(arrival.labels))

    def _train(self, packed: Sequence[_Packed]) -> StepReport:
        refused: dict[str, str] = {}
        gradients: dict[int, Mapping[str, Array]] = {}
        total, rows = 0.0, 0
        for name in {p.source.replica: None for p in packed}:
            mine = [p for p in packed if p.source.replica == name]
            replica = self._replicas.get(name) or self._new_replica(name)
            loss, used = self._train_replica(replica, mine, refused, gradients)
            total += loss * used
            rows += used
        returned = [gradients.get(id(p)) for p in packed] if self._plan.returned else []
        return StepReport(total / rows if rows else math.nan, rows, refused, returned)

    def _train_replica(
        self,
        replica: _Replica,
        packed: Sequence[_Packed],
        refused: dict[str, str],
        gradients: dict[int, Mapping[str, Array]],
    ) -> tuple[float, int]:
        """Step one replica; returns mean loss and number of rows used.

        What is refused, and the gradients to return by the arrival's ``id``, are added to the
        dictionaries.

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
            mean, gradients_finite = self._gradients(replica, unpacked)
            if gradients_finite:
                replica.optimizer.step()
                self._count(replica, unpacked)
                if self._plan.returned:
                    rows = sum(p.source.rows for p, _ in unpacked)
                    for p, h in unpacked:
                        gradients[id(p)] = self._pack_gradient(p, h, rows)
                return mean, sum(p.source.rows for p, _ in unpacked)
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
    ) -> tuple[float, bool]:
        """Backward pass of the merged loss; mean loss per row, and whether all is finite."""
        entering: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        rows = sum(p.source.rows for p, _ in unpacked)
        for p, h in unpacked:
            weights = torch.full((p.source.rows,), p.source.weight / rows, device=self.device)
            entering.setdefault(p.source.cut, []).append((h, p.labels, weights))
        replica.optimizer.zero_grad()
        for _, h in unpacked:
            h.grad = None
        loss, row_losses = depth_merged_loss(replica.model, entering)
        if not torch.isfinite(loss):
            return math.nan, False
        loss.backward()  # type: ignore[no-untyped-call]
        trained = [p for p in replica.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        nn.utils.clip_grads_with_norm_(trained, self._plan.max_norm, norm)
        return row_losses.mean().item(), bool(torch.isfinite(norm))

    def _pack_gradient(self, packed: _Packed, h: Tensor, rows: int) -> Mapping[str, Array]:
        """The gradient at the cut, of the mean over the arrival's own rows, not the merged ones."""
        assert h.grad is not None
        own = h.grad * (rows / packed.source.rows)
        axis = channel_axis(h, self._template.channels_first)
        parts = get_codec(packed.source.codec).pack(own, axis)
        return {name: part.cpu().numpy() for name, part in parts.items()}

    def _count(self, replica: _Replica, unpacked: Iterable[tuple[_Packed, Tensor]]) -> None:
        model = replica.model
        for p, _ in unpacked:
            above = [f"block.{i}" for i in range(p.source.cut, model.depth)]
            above += [f"aux.{d}" for d in model.head_depths if d > p.source.cut]
            for layer in (*above, "head"):
                replica.samples[layer] = replica.samples.get(layer, 0) + p.source.rows

    def _new_replica(self, name: str) -> _Replica:
        model = self._model_with(self._state)
        rule = get_optimizer(self._plan.optimizer)
        trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        optimizer = rule.reference(trained, dict(self._plan.hyper))
        replica = self._replicas[name] = _Replica(model, optimizer)
        return replica

    def _model_with(self, state: State) -> SplitModel:
        model = copy.deepcopy(self._template)
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the trunk's model has no {unknown[0]}; it was built otherwise")
        return model

    # --- answering ------------------------------------------------------------------------------

    def serve(self, states: Mapping[int, State]) -> None:
        """Models to answer and evaluate with, by cut; equal states share one model."""
        models: dict[int, SplitModel] = {}
        for state in states.values():
            if id(state) not in models:
                models[id(state)] = self._model_with(state).eval()
        self._serving = {cut: models[id(state)] for cut, state in states.items()}

    @torch.no_grad()
    def answer(self, arrival: Arrival) -> Array:
        """Logits (heads, rows, classes) of the heads above the cut, the true head last."""
        packed = self._receive(arrival)
        h = get_codec(arrival.codec).unpack(packed.parts)
        logits = self._above(self._serving[arrival.cut], h, arrival.cut)
        result: Array = logits.cpu().numpy()
        return result

    @torch.no_grad()
    def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        """Accuracy by tier (cut, codec) on the held-out examples, by path.

        The activations are packed and unpacked at the cut, as they are on the way from a device.
        """
        assert self._held_out is not None
        x = torch.from_numpy(self._held_out[0]).to(self.device)
        y = torch.from_numpy(self._held_out[1]).to(self.device)
        accuracy = {}
        for name, (cut, codec_name) in tiers.items():
            model, codec = self._serving[cut], get_codec(codec_name)
            hits = {"device_alone": 0, "through_hub": 0, "ensemble": 0}
            for rows in torch.split(torch.arange(len(x), device=self.device), 256):
                h, own = model.stem(x[rows]), []
                for depth in range(cut):
                    h = model.block[depth](h)
                    if str(depth + 1) in model.aux:
                        own.append(model.answer(depth + 1, h))
                sent = codec.unpack(codec.pack(h, channel_axis(h, model.channels_first)))
                hub = self._above(model, sent, cut)
                device = torch.stack(own)
                for path, logits in (
                    ("device_alone", device),
                    ("through_hub", hub[-1:]),
                    ("ensemble", torch.cat([device, hub])),
                ):
                    answers = logits.softmax(-1).mean(0).argmax(-1)
                    hits[path] += int((answers == y[rows]).sum())
            accuracy[name] = {path: n / len(x) for path, n in hits.items()}
        return accuracy

    @staticmethod
    def _above(model: SplitModel, h: Tensor, cut: int) -> Tensor:
        logits = []
        for depth in range(cut, model.depth):
            h = model.block[depth](h)
            if str(depth + 1) in model.aux:
                logits.append(model.answer(depth + 1, h))
        return torch.stack([*logits, model.head(h)])


class LocalTrunk:
    """Implements :class:`Trunk` in this process: for tests and simulation."""

    def __init__(self, core: TrunkCore) -> None:
        self.core = core

    async def start(self) -> None:
        pass

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        self.core.begin(state, plan)

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        return self.core.step(arrivals)

    async def finish(self) -> list[TrunkCopy]:
        return self.core.finish()

    async def serve(self, states: Mapping[int, State]) -> None:
        self.core.serve(states)

    async def answer(self, arrival: Arrival) -> Array:
        return self.core.answer(arrival)

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        return self.core.evaluate(tiers)

    async def close(self) -> None:
        pass
