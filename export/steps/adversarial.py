"""Graphs for training on adversarial examples: ``attack`` and ``adversarial_train``.

Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747) trains on them through the
noise norms, see :mod:`export.bases.dual_norms`.
"""

from __future__ import annotations

import torch

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.dual_norms import robustness
from export.errors import ExportError
from export.steps.client_steps import ClientSteps
from export.steps.eager import EagerSegment
from export.steps.losses import correct, local_loss, masked, reference_correct, reference_loss
from export.steps.predict import VERIFIED_ROBUSTNESS
from export.steps.step import Step, Tensors

GRADIENT = "gradient"
"""Name under which the reference of ``attack`` returns the gradient, whose sign the graph takes."""


def attack(steps: ClientSteps) -> Step:
    """``(parameters, statistics, x, y, start, epsilon, rate, low, high) -> x_adv``.

    One step of projected gradient ascent (Madry et al., ICLR 2018,
    https://arxiv.org/abs/1706.06083) on the loss with the noise norms, in evaluation mode. It
    moves ``start`` by the step size ``rate`` along the sign of the gradient, and clips the result
    to within ``epsilon`` of ``x`` and to ``low`` … ``high``.

    Raises:
        ExportError: inputs are integers, which have no gradient.
    """
    if steps.x.dtype != "float32":
        raise ExportError(
            f"adversarial examples need the gradient of inputs, and these are {steps.x.dtype}; "
            "leave out adversarial"
        )

    def function(constants: Tensors, given: Tensors) -> Tensors:
        x, start = given["x"], given["start"].detach().requires_grad_()
        with robustness(1):
            _, logits = steps.call(False, steps.inference_tensors(constants, given), start)
        loss = local_loss(masked(logits, given.get("present")), given["y"])
        (gradient,) = torch.autograd.grad(loss, [start])
        with torch.no_grad():
            x_adv = start.detach() + given["rate"] * gradient.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - given["epsilon"]), x + given["epsilon"])
            return {"x_adv": torch.minimum(torch.maximum(x_adv, given["low"]), given["high"])}

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given)
        x, start = given["x"], given["start"].clone().requires_grad_()
        with robustness(1):
            _, logits = eager.segment(start)
        reference_loss(logits, given["y"], 0.0, given.get("present")).backward()  # type: ignore[no-untyped-call]
        assert start.grad is not None
        moved = start.detach() + given["rate"] * start.grad.sign()
        moved = torch.clamp(moved, x - given["epsilon"], x + given["epsilon"])
        x_adv = moved.clamp(float(given["low"]), float(given["high"]))
        return {"x_adv": x_adv, GRADIENT: start.grad}

    limits = ("epsilon", "rate", "low", "high")
    return steps.step(
        "attack",
        function,
        [
            *steps.inference_ports(),
            Port(steps.y, "batch"),
            *steps.present_port(),
            Port(TensorSpec("start", steps.x.dtype, steps.x.shape), "batch"),
            *(Port(TensorSpec(n, "float32", ()), "hyper") for n in limits),
        ],
        [Port(TensorSpec("x_adv", steps.x.dtype, steps.x.shape), "result")],
        reference,
        {"epsilon": 0.05, "rate": 0.02, "low": -1.0, "high": 1.0},
    )


def adversarial_train(steps: ClientSteps) -> Step:
    """``(state, x, y, x_adv, hyper, robustness) -> state', loss, correct, packed activations``.

    A training step on ``(1 - robustness) * loss(x) + robustness * loss(x_adv)``, with the clean
    norms for ``x`` and the noise norms for ``x_adv``. The activations of both are packed; those of
    ``x_adv`` are called ``noise.NAME``.
    """
    names = list(steps.parameters)

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, own = steps.training_tensors(constants, given, names)
        weight, present = given["robustness"], given.get("present")
        with steps.random(given):
            with robustness(0):
                h, logits = steps.call(True, tensors, given["x"])
            with robustness(1):
                h_adv, logits_adv = steps.call(True, tensors, given["x_adv"])
        logits = masked(logits, present)
        clean = local_loss(logits, given["y"])
        loss = (1 - weight) * clean + weight * local_loss(masked(logits_adv, present), given["y"])
        gradients = torch.autograd.grad(loss, [own[n] for n in names])
        return {
            **steps.stepped(own, dict(zip(names, gradients, strict=True)), given),
            "loss": loss.detach(),
            "correct": correct(logits, given["y"]),
            **steps.pack(h),
            **steps.pack(h_adv, "noise."),
        }

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given, lambda name: True, training=True)
        weight, y, present = given["robustness"], given["y"], given.get("present")
        with eager.random():
            h, logits = eager.segment(given["x"])
            with robustness(1):
                h_adv, logits_adv = eager.segment(given["x_adv"])
        loss = (1 - weight) * reference_loss(logits, y, 0.0, present)
        loss = loss + weight * reference_loss(logits_adv, y, 0.0, present)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            **eager.stepped(),
            "loss": loss.detach(),
            **reference_correct(logits, y, present),
            **eager.unrounded(h),
            **eager.unrounded(h_adv, "noise."),
        }

    added = [
        *steps.present_port(),
        Port(TensorSpec("x_adv", steps.x.dtype, steps.x.shape), "batch"),
    ]
    return steps.step(
        "adversarial_train",
        function,
        steps.training_ports(Port(steps.y, "batch"), *added, hyper=["robustness"]),
        [
            *steps.next_state_ports(),
            *steps.result_ports(),
            *steps.packed_ports(),
            *steps.packed_ports("noise."),
        ],
        reference,
        {"robustness": VERIFIED_ROBUSTNESS},
    )
