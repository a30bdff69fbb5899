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
    follow those of ``activate``, which has the same seed. The gradient of a tensor that the stem
    reads as well is added to a slot: ``backward`` makes one step with its whole gradient.
    """
    names = [n for n in steps.parameters if in_head(n)]
    tied = list(steps.waiting)
    head = _Head(steps.segment)

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, own = steps.training_tensors(constants, given, [*names, *tied])
        features = steps.unpack(given, "features.", steps.features).detach().requires_grad_()
        with steps.random(given, steps.random_calls):
            logits = steps.apply(head, True, tensors, features).unsqueeze(0)
        loss = local_loss(logits, given["y"])
        wanted = [features, *(own[n] for n in [*names, *tied])]
        back, *parts = torch.autograd.grad(loss, wanted)
        gradients = dict(zip([*names, *tied], parts, strict=True))
        waiting = {f"next/{s}": given[s] + gradients.pop(n) for n, s in steps.waiting.items()}
        packed = steps.codec.pack(back, steps.features_axis)
        return {
            **steps.stepped(own, gradients, given),
            **waiting,
            "loss": loss.detach(),
            "correct": correct(logits, given["y"]),
            **{f"grad.{n}": part for n, part in packed.items()},
        }

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given, in_head, training=True)
        shared = {s: eager.parameters[n].requires_grad_() for n, s in steps.waiting.items()}
        features = steps.unpack(given, "features.", steps.features).detach().requires_grad_()
        with eager.random(steps.random_calls):
            logits = eager.segment.head(features).unsqueeze(0)
        loss = reference_loss(logits, given["y"])
        loss.backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None
        return {
            **eager.stepped(),
            **{f"next/{s}": given[s] + p.grad for s, p in shared.items() if p.grad is not None},
            "loss": loss.detach(),
            **reference_correct(logits, given["y"]),
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
