"""Inference graphs: ``predict`` and ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from export.bases.dual_norms import robustness
from export.steps.client_steps import ClientSteps
from export.steps.eager import EagerSegment
from export.steps.step import Step, Tensors

VERIFIED_ROBUSTNESS = 0.3
"""Robustness at which graphs are verified."""


def predict(steps: ClientSteps) -> Step:
    """``(parameters, statistics, x) -> logits, packed activations``, in evaluation mode.

    Logits are (heads, batch, classes), or (heads, batch, positions, vocabulary) for tokens.
    """

    def function(constants: Tensors, given: Tensors) -> Tensors:
        with steps.robust(given):
            h, logits = steps.call(False, steps.inference_tensors(constants, given), given["x"])
        return {"logits": logits, **steps.pack(h)}

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given)
        h, logits = evaluated(eager, given)
        return {"logits": logits, **eager.unrounded(h)}

    return steps.step(
        "predict",
        function,
        [*steps.inference_ports(), *steps.robustness_port()],
        [steps.logits_port(), *steps.packed_ports()],
        reference,
        {"robustness": VERIFIED_ROBUSTNESS},
    )


def forward(steps: ClientSteps) -> Step:
    """``(parameters, statistics, x) -> packed activations``, in evaluation mode."""

    def function(constants: Tensors, given: Tensors) -> Tensors:
        h, _ = steps.call(False, steps.inference_tensors(constants, given), given["x"])
        return steps.pack(h)

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given)
        with torch.no_grad():
            return eager.unrounded(eager.activations())

    return steps.step("forward", function, steps.inference_ports(), steps.packed_ports(), reference)


def evaluated(eager: EagerSegment, given: Tensors) -> tuple[Tensor, Tensor]:
    """Activations and logits of a segment in evaluation mode, at the given robustness."""
    with torch.no_grad(), robustness(float(given.get("robustness", 0))):
        result: tuple[Tensor, Tensor] = eager.segment(given["x"])
    return result
