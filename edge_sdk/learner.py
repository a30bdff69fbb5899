"""Local training: batches through the step graphs of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

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


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        parameters: the trained parameters by name.
        samples: number of local examples.
        metrics: ``loss`` and ``accuracy`` of the last epoch, before each step, weighted by labels.
    """

    parameters: dict[str, Array]
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Packed:
    """The packed activations of a batch and its labels, on their way to the hub."""

    batch: int
    parts: dict[str, Array]
    labels: Array


Training = Generator[Packed | None, dict[str, Array] | None, LocalResult]
"""Local training, a step at a time: yields what is to be sent, or None; returns the result.

With ``activations == "returned"`` it is sent the packed gradient of what it has yielded.
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
            if step is not None:
                emit(step.batch, step.parts, step.labels)

    def training(self, state: Mapping[str, Array], data: Examples, plan: LocalPlan) -> Training:
        """The local epochs of one round, a step at a time.

        Every example's activations are yielded exactly once: by the training steps of the first
        epoch (``plan.activations == "train"``, no extra compute), by a pass before training
        (``"forward"``, what FedSplitX's paper does), or not at all (``"none"``). With
        ``"returned"`` they are yielded in every epoch, and the step is made with the gradient
        that comes back; the auxiliary heads rest.

        Args:
            state: parameters to start from; optimizer slots start at zero.
            data: examples that fit the manifest, see :meth:`Examples.fitted`.
            plan: epochs, batch size, hyper-parameters.
        """
        runtime, rng = self.runtime, np.random.default_rng(plan.seed)
        runtime.set_state(state)
        hyper = {name: np.asarray(value, np.float32) for name, value in plan.hyper.items()}
        seeded = any(port.role == "seed" for port in self.manifest.graphs["train"].inputs)
        size = min(plan.batch_size, self.manifest.limits.get("batch", plan.batch_size))
        if plan.activations == "forward":
            for number, batch in enumerate(data.batches(size, rng)):
                yield Packed(number, runtime.run("forward", {"x": batch.x}), batch.y)
        loss = correct = 0.0
        sent = 0
        for epoch in range(plan.epochs):
            loss = correct = 0.0
            for number, batch in enumerate(data.batches(size, rng)):
                seed = {"seed": np.asarray(rng.integers(MAX_SEED))} if seeded else {}
                if plan.activations == "returned":
                    parts = runtime.run("activate", {"x": batch.x, **seed})
                    gradient = yield Packed(sent, parts, batch.y)
                    sent += 1
                    assert gradient is not None
                    grad = {f"grad.{name}": part for name, part in gradient.items()}
                    runtime.run("backward", {"x": batch.x, **grad, **hyper, **seed})
                    yield None
                    continue
                outputs = runtime.run("train", {"x": batch.x, "y": batch.y, **hyper, **seed})
                loss += float(outputs.pop("loss")) * batch.labels
                correct += float(outputs.pop("correct"))
                wanted = epoch == 0 and plan.activations == "train"
                yield Packed(number, outputs, batch.y) if wanted else None
        heads_trained = plan.epochs > 0 and plan.activations != "returned"
        metrics = {"loss": loss / data.labels, "accuracy": correct / data.labels}
        return LocalResult(runtime.get_state(), len(data), metrics if heads_trained else {})

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
) -> Packed | LocalResult | None:
    """The next step of local training: what is to be sent, None, or the result at its end."""
    try:
        return training.send(gradient)
    except StopIteration as end:
        result: LocalResult = end.value
        return result
