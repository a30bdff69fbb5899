"""The graph ``predict_int8``: inference with 8-bit matrices as constants of the graph.

Matrices of linear layers, convolutions and embeddings are int8 with a float32 scale per output
channel; activations and all other tensors are float32. In bundles for ONNX Runtime these constants
are outside of the file, and a device quantizes its own state in their place
(:mod:`edge_sdk.runtime.quantize`). A ``.pte`` file holds its constants, so the graph has the
weights of the export, and a device refuses it once it has others.

A matrix is ``codes * scale`` in the graph. ONNX Runtime computes this product once, when it loads
the graph, and then runs as fast as with float32 constants. It would run ``DequantizeLinear`` in
every call, unless an option of the session disables that. ExecuTorch computes the product in every
call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.inference.metrics import softmax
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner, Precision
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from export.steps.client_steps import ClientSteps
from export.steps.compact_weights import (
    Quantized,
    constants_of,
    is_grouped,
    matrix_axes,
    quantize,
    restored,
)
from export.steps.predict import predict
from export.steps.step import Step, Tensors

INT8 = "predict_int8"
"""Name of the graph."""


def quantize_matrices(steps: ClientSteps, runtime: RuntimeName) -> dict[str, Quantized]:
    """Quantize the matrices of a segment for a runtime; returns them by name.

    Grouped convolutions stay float32 on ExecuTorch. XNNPACK runs them only with constant float32
    weights. As matrix products, like other convolutions, they would be 3 to 9 times slower, and a
    depthwise kernel is small.
    """
    tensors = {**steps.initial, **steps.constants}
    return {
        name: quantize(tensors[name], axis)
        for name, module, axis in matrix_axes(steps.segment)
        # tied tensors are quantized once; computed ones are not quantized
        if name in tensors and not (is_grouped(module) and runtime == "executorch")
    }


def predict_int8(steps: ClientSteps, matrices: Mapping[str, Quantized]) -> Step:
    """``x -> logits, packed activations``: ``predict`` with the weights as constants.

    Args:
        steps: steps of the segment.
        matrices: quantized matrices by name.
    """
    predict_step = predict(steps)
    tensors = {**steps.initial, **steps.constants}
    constants = {n: t for n, t in tensors.items() if n not in matrices} | constants_of(matrices)

    def function(constants: Tensors, given: Tensors) -> Tensors:
        with restored(constants, matrices) as values:
            return predict_step.function(values, {**values, **given})

    def reference(given: Tensors) -> Tensors:
        assert predict_step.reference is not None
        weights = {n: m.restore() for n, m in matrices.items()}
        return predict_step.reference({**steps.initial, **weights, **given})

    inputs = tuple(port for port in predict_step.inputs if port.role != "state")
    return Step(
        INT8,
        function,
        inputs,
        predict_step.outputs,
        constants,
        predict_step.limits,
        reference,
        predict_step.verified_at,
    )


@dataclass(frozen=True)
class LossCheck:
    """Limit for the loss of int8 graphs, and the examples on which it is measured.

    Attributes:
        examples: labelled examples like those on the devices.
        max_loss: largest loss, see :class:`Comparison`.
        allow_loss: whether graphs that lose more are exported nevertheless.
    """

    examples: Examples
    max_loss: float = 0.01
    allow_loss: bool = False

    def __post_init__(self) -> None:
        if not self.max_loss >= 0:
            raise ExportError(f"the largest loss is {self.max_loss}; it must be 0 or more")

    def judge(self, tier: str, comparison: Comparison) -> None:
        """Raise :class:`ExportError` if the int8 graph of a tier loses more than allowed."""
        if comparison.loss > self.max_loss and not self.allow_loss:
            measure = comparison.measure
            raise ExportError(
                f"tier {tier!r}: {measure} is {comparison.float32.score:.4g} in float32 and "
                f"{comparison.int8.score:.4g} in int8, a loss of {comparison.loss:.2%} where "
                f"{self.max_loss:.2%} are allowed; raise --max-loss, give --allow-loss, or export "
                "the tier in float32. Nothing was written"
            )


@dataclass(frozen=True)
class Figures:
    """Quality and cost of a graph for inference.

    Attributes:
        score: accuracy, or perplexity.
        kilobytes: size in kB of the files needed for an answer: the graph, and in float32 the
            weights.
        milliseconds: median latency of one example, on one thread of the exporting machine.
    """

    score: float
    kilobytes: float
    milliseconds: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of ``predict`` with ``predict_int8``.

    Attributes:
        measure: ``accuracy`` of the mean of the heads' softmax; or for a model of tokens its
            ``perplexity``, the exponential of the mean cross-entropy over the labels.
        float32: figures of ``predict``.
        int8: figures of ``predict_int8``.
        loss: decrease of the accuracy, or relative increase of the perplexity; negative if int8
            is better.
    """

    measure: Literal["accuracy", "perplexity"]
    float32: Figures
    int8: Figures
    loss: float

    def to_json(self) -> dict[str, Any]:
        """The figures as plain dictionaries."""
        return asdict(self)


_ROWS = 256
_REPEATS = 20


def compare(manifest: Manifest, read: Callable[[str], bytes], examples: Examples) -> Comparison:
    """Run both graphs of a bundle on examples, as a device does.

    Args:
        manifest: a manifest with ``predict_int8``.
        read: returns the content of a blob, given its name.
        examples: labelled examples.

    Raises:
        DataError: the examples do not fit the model.
    """
    examples = examples.fitted(manifest)
    learner = Learner(manifest, load_runtime(Bundle.open(manifest, read)))
    blobs: dict[Precision, set[str]] = {
        "float32": {manifest.initial_state, *_files(manifest, "predict")},
        "int8": _files(manifest, INT8),
    }
    correct, entropy, figures = {}, {}, {}
    for precision, names in blobs.items():
        correct[precision], entropy[precision] = _answers(learner, examples, precision)
        score = correct[precision] / examples.labels
        if manifest.task == "tokens":
            score = float(np.exp(entropy[precision]))
        size = sum(manifest.blobs[name] for name in names) / 1000
        figures[precision] = Figures(score, size, _latency_ms(learner, examples.x[:1], precision))
    if manifest.task == "tokens":
        loss = float(np.expm1(entropy["int8"] - entropy["float32"]))
        return Comparison("perplexity", figures["float32"], figures["int8"], loss)
    loss = (correct["float32"] - correct["int8"]) / examples.labels
    return Comparison("accuracy", figures["float32"], figures["int8"], loss)


def _files(manifest: Manifest, graph: str) -> set[str]:
    """Blobs of a graph and of the constants that it refers to."""
    named = set(manifest.graphs[graph].constants)
    held = {c.blob for c in manifest.constants if named & {t.name for t in c.tensors}}
    return {manifest.graphs[graph].blob, *held}


def _answers(learner: Learner, examples: Examples, precision: Precision) -> tuple[int, float]:
    """Number of correctly predicted labels, and mean cross-entropy of the labels in nats."""
    correct, entropy = 0, 0.0
    for batch in examples.batches(learner.manifest.limits.get("batch", _ROWS)):
        logits, _ = learner.predict(batch.x, precision)
        counted = batch.y >= 0
        probabilities = softmax(logits).mean(0)[counted]
        labels = batch.y[counted]
        correct += int((probabilities.argmax(-1) == labels).sum())
        wanted = np.take_along_axis(probabilities, labels[:, None], -1)
        entropy -= float(np.log(np.maximum(wanted, np.finfo(np.float64).tiny)).sum())
    return correct, entropy / examples.labels


def _latency_ms(learner: Learner, x: Array, precision: Precision) -> float:
    learner.predict(x, precision)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        learner.predict(x, precision)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)
