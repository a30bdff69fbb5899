"""The graph ``predict_int8``: inference with 8-bit matrices as constants of the graph.

Matrices of linear layers, convolutions and embeddings are int8 with a float32 scale per output
channel; activations and all other tensors are float32. The weights are those at export: training
does not change this graph.

A matrix is ``codes * scale`` in the graph. ONNX Runtime computes this product once, when it loads
the graph, and then runs as fast as with float32 constants. It would run ``DequantizeLinear`` in
every call, unless an option of the session disables that. ExecuTorch computes the product in every
call. Rows of an embedding are looked up as codes, so that the table stays int8 in memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.inference.metrics import softmax
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner, Precision
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from export.steps.client_steps import ClientSteps
from export.steps.predict import predict
from export.steps.step import Step, Tensors
from export.torch_internals import ConvolutionBase, TransposedConvolutionBase

INT8 = "predict_int8"
"""Name of the graph."""

_LARGEST = 127
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """A float32 tensor as ``codes * scale``.

    Attributes:
        codes: int8 from -127 to 127, in the shape of the tensor.
        scale: one float32 per channel, in a shape that broadcasts.
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The float32 tensor."""
        return self.codes.to(torch.float32) * self.scale


def quantize(weight: Tensor, axis: int = 0) -> Quantized:
    """Quantize a finite float32 tensor to 8 bits, symmetrically, with one scale per channel.

    ``scale = max|w| / 127`` over a channel of ``axis``, so no element changes by more than half of
    the scale. A channel whose scale would be subnormal (below 1.2e-38) becomes zero.
    """
    others = [d for d in range(weight.dim()) if d != axis]
    scale = weight.abs().amax(others, keepdim=True) / _LARGEST
    scale = torch.where(scale < _TINY, 2 * _LARGEST * _TINY, scale)
    return Quantized(torch.round(weight / scale).to(torch.int8), scale)


def quantize_matrices(steps: ClientSteps, runtime: RuntimeName) -> dict[str, Quantized]:
    """Quantize the matrices of a segment for a runtime; returns them by name.

    Grouped convolutions stay float32 on ExecuTorch. XNNPACK runs them only with constant float32
    weights. As matrix products, like other convolutions, they would be 3 to 9 times slower, and a
    depthwise kernel is small.
    """
    tensors = {**steps.initial, **steps.constants}
    found = {}
    for path, module in steps.segment.named_modules():
        grouped = isinstance(module, ConvolutionBase) and module.groups > 1
        matrix = _matrix(module)
        if matrix is None or (grouped and runtime == "executorch"):
            continue
        name = f"{path}.{matrix[0]}"
        if name in tensors:  # tied tensors are quantized once; computed ones are not quantized
            found[name] = quantize(tensors[name], matrix[1])
    return found


def _matrix(module: nn.Module) -> tuple[str, int] | None:
    """The name of a module's matrix and the axis of its output channels, if it has one."""
    match module:
        case nn.MultiheadAttention() if module.in_proj_weight is not None:
            return "in_proj_weight", 0
        case nn.Embedding() if module.max_norm is not None:  # a look-up changes the table
            return None
        case TransposedConvolutionBase():
            return "weight", 1
        case nn.Linear() | nn.Embedding() | ConvolutionBase():
            return "weight", 0
    # the linear layer of GPT-2 in transformers has weights (in, out)
    return ("weight", 1) if type(module).__name__ == "Conv1D" else None


class _LookUp(TorchFunctionMode):
    """While active, looks up rows of a quantized table before dequantizing them.

    Args:
        tables: quantized tables by the id of the dequantized tensor.
    """

    def __init__(self, tables: Mapping[int, Quantized]) -> None:
        super().__init__()
        self._tables = tables

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.embedding and len(args) > 1 and id(args[1]) in self._tables:
            table = self._tables[id(args[1])]
            rows = Quantized(F.embedding(args[0], table.codes), F.embedding(args[0], table.scale))
            return rows.dequantize()
        return function(*args, **(kwargs or {}))


def predict_int8(steps: ClientSteps, matrices: Mapping[str, Quantized]) -> Step:
    """``x -> logits, packed activations``: ``predict`` with the weights as constants.

    Args:
        steps: steps of the segment.
        matrices: quantized matrices by name.
    """
    predict_step = predict(steps)
    tensors = {**steps.initial, **steps.constants}
    constants = {n: t for n, t in tensors.items() if n not in matrices}
    for name, matrix in matrices.items():
        constants |= {f"{name}/codes": matrix.codes, f"{name}/scale": matrix.scale}

    def function(quantized: Tensors, given: Tensors) -> Tensors:
        values, tables = dict(quantized), {}
        for name in matrices:
            matrix = Quantized(values.pop(f"{name}/codes"), values.pop(f"{name}/scale"))
            values[name] = matrix.dequantize()
            tables[id(values[name])] = matrix
        with _LookUp(tables):
            return predict_step.function(values, {**values, **given})

    def reference(given: Tensors) -> Tensors:
        assert predict_step.reference is not None
        weights = {n: m.dequantize() for n, m in matrices.items()}
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
    graph = manifest.graphs["predict"]
    constants = {c.blob for c in manifest.constants for t in c.tensors if t.name in graph.constants}
    float32_blobs = {graph.blob, manifest.initial_state, *constants}
    blobs: dict[Precision, set[str]] = {
        "float32": float32_blobs,
        "int8": {manifest.graphs[INT8].blob},
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
