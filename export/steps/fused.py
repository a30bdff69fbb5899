"""The graph that fuses the gradient of the heads with one that the hub returns: ``fuse``."""

from __future__ import annotations

import torch

from edge_sdk.bundle.manifest import Port
from export.steps.client_steps import ClientSteps
from export.steps.eager import EagerSegment
from export.steps.losses import correct, local_loss, reference_correct, reference_loss
from export.steps.step import Step, Tensors
from export.tensor_names import in_head, is_below_heads


def fuse(steps: ClientSteps) -> Step:
    """``(state, x, y, packed gradient, hyper, seed) -> state', loss, correct``: a fused step.

    Gradients are fused as in SuperSFL (https://arxiv.org/abs/2601.02092). The stem and the blocks
    are updated with ``own`` times the gradient of the heads' loss plus ``1 - own`` times the
    returned gradient; the heads are updated with the gradient of their loss. ``own`` is a
    hyper-parameter above 0 and at most 1. The graph recomputes the forward pass, as ``backward``
    does.
    """

    def trains(name: str) -> bool:
        return not in_head(name)

    names = [n for n in steps.parameters if trains(n)]

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, own = steps.training_tensors(constants, given, steps.parameters)
        gradient = steps.unpack(given, "grad.", steps.packed)
        weight = given["own"]
        with steps.random(given):
            h, logits = steps.call(True, tensors, given["x"])
        loss = local_loss(logits, given["y"], steps.distill)
        fused = torch.autograd.grad(
            [loss, h], [own[n] for n in names], [weight, (1 - weight) * gradient]
        )
        with torch.no_grad():
            gradients = {
                n: g if is_below_heads(n) else g / weight for n, g in zip(names, fused, strict=True)
            }
        return {
            **steps.stepped(own, gradients, given),
            "loss": loss.detach(),
            "correct": correct(logits, given["y"]),
        }

    def reference(given: Tensors) -> Tensors:
        """The two gradients of the blocks are computed one after the other."""
        eager = EagerSegment(steps, given, trains, training=True)
        with eager.random():
            h, logits = eager.segment(given["x"])
        loss = reference_loss(logits, given["y"], steps.distill)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        for name, p in eager.trained.items():
            if is_below_heads(name) and p.grad is not None:
                p.grad *= given["own"]
        h.backward((1 - given["own"]) * steps.unpack(given, "grad.", steps.packed))
        return {
            **eager.stepped(),
            "loss": loss.detach(),
            **reference_correct(logits, given["y"]),
        }

    return steps.step(
        "fuse",
        function,
        steps.training_ports(Port(steps.y, "batch"), *steps.packed_ports("grad."), hyper=["own"]),
        [*steps.next_state_ports(), *steps.result_ports()],
        reference,
        {"own": 0.3},
    )
