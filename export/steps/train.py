"""The training graph of a device that learns from the loss of its own heads: ``train``."""

from __future__ import annotations

import torch

from edge_sdk.bundle.manifest import Port
from export.steps.client_steps import ClientSteps
from export.steps.eager import EagerSegment
from export.steps.losses import correct, local_loss, masked, reference_correct, reference_loss
from export.steps.step import Step, Tensors
from export.tensor_names import in_head


def train(steps: ClientSteps) -> Step:
    """``(state, x, y, hyper) -> state', loss, correct, packed activations``: one local step.

    The segment runs in training mode: batch norms use the batch and update their running
    statistics, and dropouts draw their masks from the input ``seed``. ``correct`` is the number of
    labels that the mean of the heads' softmax predicts. Noise norms stay.
    """

    def trains(name: str) -> bool:
        return not in_head(name) and name not in steps.noise

    names = [n for n in steps.parameters if trains(n)]

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, own = steps.training_tensors(constants, given, steps.parameters)
        with steps.random(given):
            h, logits = steps.call(True, tensors, given["x"])
        logits = masked(logits, given.get("present"))
        loss = local_loss(logits, given["y"], steps.distill)
        gradients = torch.autograd.grad(loss, [own[n] for n in names])
        return {
            **steps.stepped(own, dict(zip(names, gradients, strict=True)), given),
            "loss": loss.detach(),
            "correct": correct(logits, given["y"]),
            **steps.pack(h),
        }

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given, trains, training=True)
        with eager.random():
            h, logits = eager.segment(given["x"])
        loss = reference_loss(logits, given["y"], steps.distill, given.get("present"))
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            **eager.stepped(),
            "loss": loss.detach(),
            **reference_correct(logits, given["y"], given.get("present")),
            **eager.unrounded(h),
        }

    return steps.step(
        "train",
        function,
        steps.training_ports(Port(steps.y, "batch"), *steps.present_port()),
        [*steps.next_state_ports(), *steps.result_ports(), *steps.packed_ports()],
        reference,
    )
