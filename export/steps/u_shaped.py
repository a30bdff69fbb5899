"""The graph of the model's head on the device, where the labels stay: ``finish``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.bundle.manifest import Port
from export.cutting.split_model import ClientSegment
from export.steps.client_steps import ClientSteps, packed_ports
from export.steps.eager import EagerSegment
from export.steps.losses import correct, local_loss, reference_correct, reference_loss
from export.steps.step import Step, Tensors
from export.tensor_names import in_head


def finish(steps: ClientSteps) -> Step:
    """``(state, packed features, y, hyper, seed) -> state', loss, correct, packed gradient``.

    A step of the model's head. ``features.NAME`` are the packed outputs of the last block on the
    hub; ``grad.NAME`` is the gradient of the mean loss with respect to them. Its random masks
    follow those of ``activate``, which has the same seed.
    """
    names = [n for n in steps.parameters if in_head(n)]
    head = _Head(steps.segment)

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, own = steps.training_tensors(constants, given, names)
        features = steps.unpack(given, "features.", steps.features).detach().requires_grad_()
        with steps.random(given, steps.random_calls):
            logits = steps.apply(head, True, tensors, features).unsqueeze(0)
        loss = local_loss(logits, given["y"])
        back, *gradients = torch.autograd.grad(loss, [features, *(own[n] for n in names)])
        packed = steps.codec.pack(back, steps.features_axis)
        return {
            **steps.stepped(own, dict(zip(names, gradients, strict=True)), given),
            "loss": loss.detach(),
            "correct": correct(logits, given["y"]),
            **{f"grad.{n}": part for n, part in packed.items()},
        }

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given, in_head, training=True)
        features = steps.unpack(given, "features.", steps.features).detach().requires_grad_()
        with eager.random(steps.random_calls):
            logits = eager.segment.head(features).unsqueeze(0)
        loss = reference_loss(logits, given["y"])
        loss.backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None
        return {
            **eager.stepped(),
            "loss": loss.detach(),
            "correct": reference_correct(logits, given["y"]),
            **eager.unrounded(features.grad, "grad.", steps.features_axis),
        }

    return steps.step(
        "finish",
        function,
        steps.training_ports(
            *packed_ports(steps.features, "features."), Port(steps.y, "batch"), x=False
        ),
        [
            *steps.next_state_ports(),
            *steps.result_ports(),
            *packed_ports(steps.features, "grad."),
        ],
        reference,
    )


class _Head(nn.Module):
    """The model's head on a U-shaped segment, under the same names."""

    def __init__(self, segment: ClientSegment) -> None:
        super().__init__()
        self.head = segment.head

    def forward(self, h: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(h)
        return logits
