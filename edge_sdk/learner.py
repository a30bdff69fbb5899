"""Local training: batches through the step graphs of a bundle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk import text
from edge_sdk.bundle import Manifest
from edge_sdk.data import Examples
from edge_sdk.errors import BundleError
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime

MAX_SEED = 2**31 - 70
"""Seeds of dropout are below this: the prime that masks are computed with is just above it."""

Precision = Literal["float32", "int8"]
"""Of the weights in a graph for inference."""

Emit = Callable[[int, dict[str, Array], Array], None]
"""Takes a batch number, its packed activations and its labels."""


@dataclass(frozen=True)
class LocalPlan:
    """How to train in one round; field by field what the ``round`` message says."""

    epochs: int
    batch_size: int
    hyper: Mapping[str, float]
    activations: str
    seed: int
    staleness: int = 0


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        state: what was trained, by name: the tensors that training started from.
        samples: number of local examples.
        metrics: ``loss`` and ``accuracy`` of the last epoch, before each step, weighted by labels.
    """

    state: dict[str, Array]
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Packed:
    """The packed activations of a batch and its labels, on their way to the hub."""

    batch: int
    parts: dict[str, Array]
    labels: Array


@dataclass(frozen=True)
class Wanted:
    """The gradient of a batch that was sent: to be waited for, or taken if it is there."""

    batch: int
    wait: bool


@dataclass(frozen=True)
class _Flight:
    """A batch on its way: what its step will be computed from again."""

    batch: int
    inputs: Mapping[str, Array]


Training = Generator[Packed | Wanted | None, dict[str, Array] | None, LocalResult]
"""Local training, a step at a time; returns the result.

Yields what is to be sent; or which gradient it wants, to be sent it, packed, or None if it need
not wait and there is none yet; or None.
"""


class Learner:
    """Trains and predicts with the step graphs of one bundle."""

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self.manifest = manifest
        self.runtime = runtime

    def train(
        self, state: Mapping[str, Array], data: Examples, plan: LocalPlan, emit: Emit
    ) -> LocalResult:
        """:meth:`training` from start to end, where no gradient comes back.

        Args:
            state: as for :meth:`training`.
            data: as for :meth:`training`.
            plan: as for :meth:`training`.
            emit: receives the packed activations of each batch.
        """
        training = self.training(state, data, plan)
        while True:
            step = advance(training)
            if isinstance(step, LocalResult):
                return step
            if isinstance(step, Packed):
                emit(step.batch, step.parts, step.labels)

    def training(self, state: Mapping[str, Array], data: Examples, plan: LocalPlan) -> Training:
        """The local epochs of one round, a step at a time.

        Every example's activations are yielded exactly once: by the training steps of the first
        epoch (``plan.activations == "train"``, no extra compute), by a pass before training
        (``"forward"``, what FedSplitX's paper does), or not at all (``"none"``). With
        ``"returned"`` they are yielded in every epoch, and the step is made with the gradient
        that comes back; the auxiliary heads rest. Then ``plan.staleness`` more batches are on
        their way while a gradient is waited for: a gradient is that of activations which the
        steps since have made older by as many at most, and steps are made in the batches' order.

        Args:
            state: parameters to start from, and optimizer slots, or these start at zero; the
                result has slots if the state has.
            data: examples that fit the manifest, see :meth:`Examples.fitted`.
            plan: epochs, batch size, hyper-parameters.
        """
        runtime, rng = self.runtime, np.random.default_rng(plan.seed)
        runtime.set_state(state)
        hyper = {name: np.asarray(value, np.float32) for name, value in plan.hyper.items()}
        seeded = any(port.role == "seed" for port in self.manifest.graphs["train"].inputs)
        size = min(plan.batch_size, self.manifest.limits.get("batch", plan.batch_size))
        if plan.activations == "forward":
            for number, batch in enumerate(self._batches(data, size, rng)):
                yield Packed(number, runtime.run("forward", {"x": batch.x}), batch.y)
        loss = correct = 0.0
        flights: deque[_Flight] = deque()
        sent = 0
        for epoch in range(plan.epochs):
            loss = correct = 0.0
            for number, batch in enumerate(self._batches(data, size, rng)):
                seed = {"seed": np.asarray(rng.integers(MAX_SEED))} if seeded else {}
                if plan.activations == "returned":
                    inputs = {"x": batch.x, **seed}
                    yield Packed(sent, runtime.run("activate", inputs), batch.y)
                    flights.append(_Flight(sent, inputs | hyper))
                    sent += 1
                    yield from self._land(flights, most=plan.staleness)
                    continue
                outputs = runtime.run("train", {"x": batch.x, "y": batch.y, **hyper, **seed})
                loss += float(outputs.pop("loss")) * batch.labels
                correct += float(outputs.pop("correct"))
                wanted = epoch == 0 and plan.activations == "train"
                yield Packed(number, outputs, batch.y) if wanted else None
        yield from self._land(flights, most=0)
        heads_trained = plan.epochs > 0 and plan.activations != "returned"
        metrics = {"loss": loss / data.labels, "accuracy": correct / data.labels}
        slots = any(e.kind == "slot" and e.spec.name in state for e in self.manifest.state)
        result = runtime.get_state(slots)
        return LocalResult(result, len(data), metrics if heads_trained else {})

    def _batches(self, data: Examples, size: int, rng: np.random.Generator) -> Iterator[Examples]:
        """Shuffled batches; texts come with others of their length."""
        texts = self.manifest.task == "tokens"
        return text.batches(data, size, rng) if texts else data.batches(size, rng)

    def _land(
        self, flights: deque[_Flight], most: int
    ) -> Generator[Wanted | None, dict[str, Array] | None, None]:
        """Step with the gradients that are there, and wait until ``most`` batches are left."""
        while flights:
            wait = len(flights) > most
            gradient = yield Wanted(flights[0].batch, wait)
            if gradient is None:
                assert not wait
                return
            grad = {f"grad.{name}": part for name, part in gradient.items()}
            self.runtime.run("backward", {**flights.popleft().inputs, **grad})
            yield None

    def predict(self, x: Array, precision: Precision = "float32") -> tuple[Array, dict[str, Array]]:
        """Logits of the device's heads, and the packed activations.

        Logits are (heads, batch, classes), or (heads, batch, positions, vocabulary).

        Args:
            x: inputs as the model takes them.
            precision: ``float32`` for the state that the runtime holds; ``int8`` for the weights
                of the export.

        Raises:
            BundleError: the bundle has no graph of this precision.
        """
        graph = "predict" if precision == "float32" else f"predict_{precision}"
        if graph not in self.manifest.graphs:
            raise BundleError(
                f"the bundle of tier {self.manifest.tier!r} has no graph {graph!r}; export the "
                f'tier with precision = "{precision}", or predict in float32'
            )
        outputs = self.runtime.run(graph, {"x": x})
        return outputs.pop("logits"), outputs


def advance(
    training: Training, gradient: dict[str, Array] | None = None
) -> Packed | Wanted | LocalResult | None:
    """The next step of local training: what it yields, or the result at its end."""
    try:
        return training.send(gradient)
    except StopIteration as end:
        result: LocalResult = end.value
        return result
