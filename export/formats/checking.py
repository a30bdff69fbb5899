"""Checks a written inference graph against the model's own code, and measures it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.bundle.manifest import Port
from edge_sdk.inference.metrics import Tally
from edge_sdk.protocol.tensors import Array, TensorSpec
from edge_sdk.training.data import Examples
from export.errors import ExportError, reason
from export.formats.inference import Heads, InferenceGraph, eager_answers
from export.lowering.verification.compare import expected, rounding_error
from export.lowering.verification.float64 import Eager, Float64
from export.lowering.verification.traced import Outputs, widened

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a written file: takes the inputs and returns the logits of each head, both by name."""

CHECKED_ROBUSTNESS = 0.3
"""Robustness at which graphs with dual norms are checked; they are measured at 0."""

_REPEATS = 20
_ROWS = 64
"""Rows that are answered at a time when accuracy is measured."""

_VALUES = 2**24
"""Largest number of logits of a batch, which bounds the memory."""


def check(graph: InferenceGraph, module: Heads, run: Run, inputs: Sequence[Tensor]) -> None:
    """Compare a written file with the model's own code, in the runtime itself.

    The logits equal those of the model in float64 within rounding: at most
    :data:`export.lowering.verification.compare.MARGIN` times the rounding of PyTorch in float32,
    row by row.

    Args:
        graph: what the file holds.
        module: the model's own code.
        run: runs the file.
        inputs: batches of inputs.

    Raises:
        ExportError: the file differs or cannot be run.
    """
    ports = tuple(Port(TensorSpec(name, "float32", ()), "result") for name in graph.names)
    wide_states, narrow_states = graph.exact(wide=True), graph.exact(wide=False)
    for x in inputs:
        given = {"x": x}
        if graph.dual:
            given["robustness"] = torch.tensor(CHECKED_ROBUSTNESS)
        with sdpa_kernel(SDPBackend.MATH):
            with Eager(), Float64():
                wide = eager_answers(module, wide_states, widened(given))
            narrow = eager_answers(module, narrow_states, given)
        wide = {name: logits.double() for name, logits in wide.items()}
        bounds = expected(ports, Outputs(wide, wide), Outputs(narrow, narrow), {})
        try:
            got = run({n: t.numpy() for n, t in given.items()})
        except Exception as error:  # runtimes raise errors of any class
            raise ExportError(f"the file fails for batch {len(x)}: {reason(error)}") from error
        wrong = rounding_error({n: torch.from_numpy(t) for n, t in got.items()}, bounds)
        if wrong is not None:
            name, difference = wrong
            raise ExportError(
                f"the file differs from the trained model in the logits of {name} by "
                f"{difference:.2g}, more than rounding explains (batch {len(x)}); nothing was "
                "written"
            )


def batches_to_check(rows: Tensor, limits: Mapping[str, int]) -> list[Tensor]:
    """Batches of 1 and more rows; of texts, some are shorter than the others.

    Args:
        rows: inputs (rows, ...), held out or drawn.
        limits: largest ``batch`` and ``seq`` of the graph.
    """
    largest = min(len(rows), limits.get("batch", 8), 8)
    sizes = sorted({1, min(3, largest), largest})
    batches = [rows[:size] for size in sizes]
    if not rows.is_floating_point() and rows.dim() == 2 and "seq" in limits:
        lengths = [
            min(rows.shape[1], limits["seq"]),
            max(min(rows.shape[1], limits["seq"]) // 2, 1),
        ]
        batches = [b[:, : lengths[i % 2]] for i, b in enumerate(batches)]
    return batches


def scores(
    run: Run, heads: Sequence[str], examples: Examples, task: str, limits: Mapping[str, int]
) -> dict[str, float]:
    """Accuracy of each head on examples, or its perplexity for a model of tokens, by name.

    Args:
        run: runs the file.
        heads: names of the heads.
        examples: labelled examples.
        task: ``classes`` or ``tokens``.
        limits: largest ``batch`` of the file, if there is one.
    """
    tallies = {head: Tally(task) for head in heads}
    size = min(limits.get("batch", _ROWS), _ROWS)
    first = run({"x": examples.x[:1]})[heads[0]]
    size = max(1, min(size, _VALUES // first.size))
    for start in range(0, len(examples.x), size):
        some = slice(start, start + size)
        answers = run({"x": examples.x[some]})
        for head, tally in tallies.items():
            tally.add(answers[head][None], examples.y[some])
    return {head: tally.value for head, tally in tallies.items()}


def latency_ms(run: Run, x: Array) -> float:
    """Median time for one row in milliseconds, after warming up."""
    for _ in range(3):
        run({"x": x[:1]})
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run({"x": x[:1]})
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)
