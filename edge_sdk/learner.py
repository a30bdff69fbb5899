"""Local training: batches through the step graphs of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
"""Takes a batch number, its packed activations and its labels; may block to slow training down."""


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


class Learner:
    """Trains and predicts with the step graphs of one bundle."""

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self.manifest = manifest
        self.runtime = runtime

    def train(
        self, state: Mapping[str, Array], data: Examples, plan: LocalPlan, emit: Emit
    ) -> LocalResult:
        """Run the local epochs of one round.

        Every example's activations are emitted exactly once: by the training steps of the first
        epoch (``plan.activations == "train"``, no extra compute), by a pass before training
        (``"forward"``, what FedSplitX's paper does), or not at all (``"none"``).

        Args:
            state: parameters to start from; optimizer slots start at zero.
            data: examples that fit the manifest, see :meth:`Examples.fitted`.
            plan: epochs, batch size, hyper-parameters.
            emit: receives the packed activations of each batch.
        """
        runtime, rng = self.runtime, np.random.default_rng(plan.seed)
        runtime.set_state(state)
        hyper = {name: np.asarray(value, np.float32) for name, value in plan.hyper.items()}
        seeded = any(port.role == "seed" for port in self.manifest.graphs["train"].inputs)
        size = min(plan.batch_size, self.manifest.limits.get("batch", plan.batch_size))
        if plan.activations == "forward":
            for number, batch in enumerate(data.batches(size, rng)):
                emit(number, runtime.run("forward", {"x": batch.x}), batch.y)
        loss = correct = 0.0
        for epoch in range(plan.epochs):
            loss = correct = 0.0
            for number, batch in enumerate(data.batches(size, rng)):
                seed = {"seed": np.asarray(rng.integers(MAX_SEED))} if seeded else {}
                outputs = runtime.run("train", {"x": batch.x, "y": batch.y, **hyper, **seed})
                loss += float(outputs.pop("loss")) * batch.labels
                correct += float(outputs.pop("correct"))
                if epoch == 0 and plan.activations == "train":
                    emit(number, outputs, batch.y)
        metrics = {"loss": loss / data.labels, "accuracy": correct / data.labels}
        return LocalResult(runtime.get_state(), len(data), metrics)

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
