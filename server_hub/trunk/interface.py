"""What the trunk takes and gives. :mod:`server_hub.trunk.step` is the arithmetic of a step."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.tensors import Array, State, TensorSpec
from export.steps.weight_decay import Decay
from server_hub.trunk.settings import Precision


@dataclass(frozen=True)
class StepInput:
    """A batch of one device, as it enters a step of the trunk.

    Attributes:
        device: name of the device that sent the batch.
        replica: name of the copy of the trunk that the batch trains.
        cut: number of the block that the activations enter.
        codec: name of the codec that they are packed with.
        batch: packed activations and labels.
        weight: weight of a label in the loss.
        label_shape: shape of the labels, where these stay on the device; else empty.
        head_gradient: gradient of the features, where labels stay on the device.
        length: number of positions of each example, of texts; else 1.
        features: what packed features must be, where labels stay on the device; else empty.
    """

    device: str
    replica: str
    cut: int
    codec: str
    batch: Batch
    weight: float = 1.0
    label_shape: tuple[int, ...] = ()
    head_gradient: HeadGradient | None = None
    length: int = 1
    features: tuple[TensorSpec, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the packed activations, in bytes."""
        return sum(part.nbytes for part in self.batch.parts.values())

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self._shape[0]

    @property
    def positions(self) -> int:
        """Number of labels, whether they count in the loss or not."""
        return math.prod(self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.label_shape if self.batch.labels is None else self.batch.labels.shape


@dataclass(frozen=True)
class Query:
    """Activations that the hub is to finish an answer from.

    Attributes:
        cut: number of the block that the activations enter.
        codec: name of the codec that they are packed with.
        parts: the packed tensors by name.
        base: number of the base network that they are of; 0 for a single model.
        robustness: weight of the noise norms in the answer, from 0 to 1.
        device: name of the device that asks.
    """

    cut: int
    codec: str
    parts: Mapping[str, Array]
    base: int = 0
    robustness: float = 0.0
    device: str = ""


@dataclass(frozen=True)
class StepReport:
    """Result of one depth-merged step.

    Attributes:
        loss: mean over the labels that count, of the summed cross-entropy of the heads above each
            label's cut. NaN if no row was used, or if the labels stay on the devices.
        rows: rows that were used; of texts, labels that count.
        refused: by device whose batch was refused, the reason.
        gradients: for each batch, if the plan returns gradients: the packed gradient of the mean
            loss over the batch's labels that count. None for a batch that was refused.
        losses: for each batch: sum of the loss over its labels that count, and their number. None
            for a batch that was refused, or whose labels stay on the device.
        diverged: devices whose batches were not used, as training of their replica has diverged.
    """

    loss: float
    rows: int
    refused: dict[str, str]
    gradients: Sequence[Mapping[str, Array] | None] = ()
    losses: Sequence[tuple[float, int] | None] = ()
    diverged: Sequence[str] = ()


@dataclass(frozen=True)
class TrunkCopy:
    """A layer as one replica of the trunk has trained it in a round.

    Attributes:
        replica: name of the replica.
        layer: name of the layer.
        tensors: trained tensors of the layer by full name.
        samples: rows that passed through the layer. An example counts once, however many
            passes devices and trunk make over it.
        base: number of the base network that the layer is of; 0 for a single model.
        diverged: whether training of the replica has diverged. There are no tensors then.
        part: whether these are tied tensors, which the replica has trained with its part of their
            gradient alone. What it has changed is added to what devices have changed.
    """

    replica: str
    layer: str
    tensors: State
    samples: int
    base: int = 0
    diverged: bool = False
    part: bool = False


@dataclass(frozen=True)
class TrunkPlan:
    """How the trunk trains in one round.

    Attributes:
        optimizer: ``sgd`` or ``adamw``.
        hyper: hyper-parameters of the optimizer.
        epochs: passes over the round's activations. Passes after the first come at the end of the
            round.
        max_rows: largest number of rows in one merged step.
        seed: seed of the order of the passes after the first.
        max_norm: gradients of a step are scaled down to this norm.
        decay: parameters that weight decay applies to, see
            :func:`export.steps.weight_decay.decayed_names`.
        precision: ``fp32``, or ``bf16`` for automatic mixed precision with weights in float32.
        u_shaped: labels stay on the devices, which train the head. Dropout is off: the pass that a
            gradient goes back through must be the one whose features the device has seen.
        returned: steps report gradients of the activations. Those are gradients of the head's loss
            alone; the auxiliary heads are not trained.
        anneal: the learning rate falls to zero over the passes, as a cosine.
        keeps_slots: the state holds optimizer slots to start from; copies hold them, too.
        bases: the state is that of so many base networks, each tensor (bases, ...). One step
            trains all base networks that a batch has arrived for. 0 for a single model.
        passes: number of times that a device sends each of its examples: with returned gradients
            once in every local epoch.
        max_tokens: largest number of positions of texts in one merged step, padding included.
        max_bytes: largest size of the packed activations in one merged step, in bytes.
    """

    optimizer: str
    hyper: Mapping[str, float]
    epochs: int = 1
    max_rows: int = 256
    seed: int = 0
    max_norm: float = math.inf
    decay: Decay = "matrices"
    precision: Precision = "fp32"
    u_shaped: bool = False
    returned: bool = False
    anneal: bool = False
    keeps_slots: bool = False
    bases: int = 0
    passes: int = 1
    max_tokens: int = 2**62
    max_bytes: int = 2**62

    @property
    def shuffles(self) -> bool:
        """Whether batches may wait in a shuffle buffer: no device waits for their gradients."""
        return not self.returned


@dataclass(frozen=True)
class EvaluationReport:
    """How good the global model is, on the held-out examples and on devices.

    Attributes:
        accuracy: accuracy, or perplexity for a model of tokens, by tier and path.
        mixed: by number n of base networks, the figure of the best n, mixed; empty for one model.
        order: numbers of the base networks, best first; empty for one model.
        on_devices: what devices say about examples that they keep back, as a record of a round
            holds it; empty if none was asked.
    """

    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    mixed: dict[int, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    on_devices: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Fields of a round's record, as JSON can hold them."""
        return {
            "accuracy": self.accuracy,
            "mixed": {str(bases): value for bases, value in self.mixed.items()},
            "order": list(self.order),
            "on_devices": self.on_devices,
        }


class Trunk(Protocol):
    """Trains the deep part of the model, and answers with the whole model.

    :class:`server_hub.trunk.local.LocalTrunk` does so in this process,
    :class:`server_hub.trunk.process.WorkerTrunk` in a process of its own.
    """

    steps_at_once: int
    """How many calls of :meth:`step` may be under way at once; they are made in their order."""

    async def start(self) -> None:
        """Make the trunk ready. May take seconds."""

    async def begin(self, state: State, plan: TrunkPlan) -> None:
        """Start a round from ``state``, with no replicas and fresh optimizers."""

    async def features(self, step_input: StepInput) -> dict[str, Array] | None:
        """Packed output of the last block for a batch; None if it is not finite.

        Raises:
            TrunkRefused: the output of this batch cannot be computed.
        """

    async def step(self, inputs: Sequence[StepInput]) -> StepReport:
        """Make one depth-merged step per replica over all inputs."""

    async def finish(self) -> list[TrunkCopy]:
        """Make the passes that are left; return every layer that was trained."""

    async def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        """Answer and evaluate with these states from now on.

        Args:
            states: tensors of the whole model by cut. With ``bases``, each tensor is (bases, ...).
            bases: number of base networks; 0 for a single model.
        """

    async def answer(self, query: Query) -> Array:
        """Logits (heads, rows, ..., classes) of the heads above the cut, the true head last.

        Raises:
            TrunkRefused: this query cannot be answered.
        """

    def evaluate(
        self, tiers: Mapping[str, tuple[int, str]], paths: Sequence[str]
    ) -> asyncio.Future[EvaluationReport]:
        """Start to evaluate the states that are served now; training goes on meanwhile.

        Args:
            tiers: cut and codec by tier.
            paths: ways to answer to evaluate: ``device_alone``, ``through_hub``, ``ensemble``; of
                base networks ``mix``.

        Returns:
            The report of a single model, or of base networks if the served states are such.
        """

    async def close(self) -> None:
        """Release everything."""
