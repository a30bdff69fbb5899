"""The trunk: training of the deep part of the model, for devices that enter at different depths.

What it takes and gives; :mod:`server_hub.trunk.step` is the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_sdk.protocol.tensors import Array

State = dict[str, Array]
"""Tensors by name, ``block.3.conv.weight``."""


@dataclass(frozen=True)
class Finished:
    """What a device says of the features of a batch whose labels it keeps.

    Attributes:
        gradient: packed gradient of the mean loss over its labels, by the features.
        labels: labels that count.
    """

    gradient: Mapping[str, Array]
    labels: int


@dataclass(frozen=True)
class Arrival:
    """Packed activations of one batch of one device.

    Attributes:
        device: who sent them.
        replica: which copy of the trunk they train.
        cut: block that they enter.
        codec: how they are packed.
        parts: the packed tensors.
        labels: (rows,) int64; (rows, positions) for a model of tokens, where -1 does not count.
            None where they stay on the device.
        weight: weight of a label in the loss.
        shape: of the labels, where these stay on the device.
        finished: what comes instead of them, once the device has had the features.
        base: which base network they are of, where there are several.
        present: (classes,), 1 for classes that the device has examples of; None where all count.
        noise: whether they have come through the noise norms.
        robustness: weight of the noise norms in an answer.
    """

    device: str
    replica: str
    cut: int
    codec: str
    parts: Mapping[str, Array]
    labels: Array | None
    weight: float = 1.0
    shape: tuple[int, ...] = ()
    finished: Finished | None = None
    base: int = 0
    present: Array | None = None
    noise: bool = False
    robustness: float = 0.0

    @property
    def rows(self) -> int:
        """Number of examples."""
        return (self.shape if self.labels is None else self.labels.shape)[0]

    @property
    def positions(self) -> int:
        """Number of labels, whether they count or not."""
        return math.prod(self.shape if self.labels is None else self.labels.shape)


@dataclass(frozen=True)
class StepReport:
    """What one depth-merged step did.

    Attributes:
        loss: mean over the labels that count of the summed cross-entropy of the heads that they
            passed; NaN if no row was used, or the labels are not here.
        rows: rows that were used; of texts, labels that count.
        refused: devices whose activations were refused, with the reason.
        gradients: of each arrival, packed as it was, where the plan has them returned: the
            gradient of the mean loss over the arrival's labels that count. None for one that was
            refused.
        losses: sum over the labels of each arrival that count, and their number; None likewise.
    """

    loss: float
    rows: int
    refused: dict[str, str]
    gradients: Sequence[Mapping[str, Array] | None] = ()
    losses: Sequence[tuple[float, int] | None] = ()


@dataclass(frozen=True)
class TrunkCopy:
    """A layer as one replica of the trunk has trained it; ``samples`` passed through it.

    ``base`` is the base network that it is of, where there are several.
    """

    replica: str
    layer: str
    tensors: State
    samples: int
    base: int = 0


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
        u_shaped: labels stay on the devices, and the head is trained there. Dropouts rest: the pass
            that a gradient goes back through must be the one that the device has seen.
        returned: whether steps report the gradients of the arrivals; these are of the head's loss
            alone, and the auxiliary heads rest.
        anneal: the learning rate goes to zero over the passes, by a cosine.
        keeps_slots: the state has optimizer slots to go on from, and the copies have them, too.
        bases: the state is that of so many base networks, each tensor (bases, ...); one step trains
            all that something has arrived for.
    """

    optimizer: str
    hyper: Mapping[str, float]
    epochs: int = 1
    max_rows: int = 256
    seed: int = 0
    max_norm: float = math.inf
    u_shaped: bool = False
    returned: bool = False
    anneal: bool = False
    keeps_slots: bool = False
    bases: int = 0


@dataclass(frozen=True)
class MixtureEvaluation:
    """How good base networks are, each as a whole.

    Attributes:
        order: their numbers, best first, by the held-out examples that are for that.
        scores: accuracy, or perplexity, of each by number, on the same.
        mixed: that of the best so many, on the other held-out examples.
    """

    order: list[int]
    scores: list[float]
    mixed: dict[int, float]


class Trunk(Protocol):
    """Trains the deep part: in this process (:class:`server_hub.trunk.step.LocalTrunk`) or in
    one of its own (:class:`server_hub.trunk.process.WorkerTrunk`)."""

    async def start(self) -> None:
        """Make it ready; may take seconds."""

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        """Start a round from ``state``: no replicas yet, fresh optimizers."""

    async def features(self, arrival: Arrival) -> dict[str, Array] | None:
        """What leaves the last block for activations, packed as they are; None if not finite."""

    async def step(self, arrivals: Sequence[Arrival]) -> StepReport:
        """One depth-merged step per replica over all arrivals."""

    async def finish(self) -> list[TrunkCopy]:
        """The passes that are left, then every layer that was trained."""

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        """The whole model's state by cut, to answer and to evaluate with.

        Of several ``bases`` each tensor is (bases, ...).
        """

    async def answer(self, arrival: Arrival) -> Array:
        """Logits (heads, rows, ..., classes) of the heads above the cut, the true head last."""

    async def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        """Accuracy, or perplexity, by tier (cut, codec) on the held-out examples, by path."""

    async def evaluate_bases(self) -> MixtureEvaluation:
        """How good the bases are on the held-out examples, each alone and mixed."""

    async def close(self) -> None:
        """Release everything."""
