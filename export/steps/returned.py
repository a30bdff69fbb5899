"""Step graphs for gradients that the hub returns.

A device sends the activations of a batch, and updates its segment with the returned gradient. If
labels stay on the device (U-shaped), the device also trains the model's head on features that the
hub sends.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.steps.client_steps import ClientSteps, Step
from export.steps.losses import correct, local_loss
from export.tensor_names import in_head, is_below_heads


def activate(steps: ClientSteps) -> Step:
    """``(parameters, statistics, x, seed) -> packed activations``, in training mode.

    These are the activations that :func:`backward` differentiates. Only ``backward`` updates the
    running statistics.
    """

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        parameters = {n: next(given) for n in steps.parameters}
        moved = {n: next(given).clone() for n in steps.statistics}
        x = next(given)
        with steps.seeded_by(given):
            h = steps.activations({**constants, **parameters, **moved}, x)
        return steps.pack(h)

    inputs = (*steps.inputs(), *steps.seed_port())
    return steps.step("activate", function, inputs, steps.packed_ports())


def backward(steps: ClientSteps) -> Step:
    """``(state, x, packed gradient, hyper, seed) -> state'``: a step on the returned gradient.

    The gradient is that of a loss on the hub with respect to the activations, packed like these:
    ``grad.NAME`` is the gradient of ``NAME``. The graph recomputes the forward pass in training
    mode, with the seed of ``activate``. The heads do not contribute to that loss, so their
    parameters and slots stay. A tied tensor is also updated with the part of its gradient that
    :func:`finish` has left in its slot.
    """
    hyper_names = list(steps.optimizer.hyper)

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        parameters = {n: next(given).detach() for n in steps.parameters}
        moved = {n: next(given).clone() for n in steps.statistics}
        slots = {n: next(given) for n in steps.slots}
        trained = {n: p.requires_grad_() for n, p in parameters.items() if is_below_heads(n)}
        x = next(given)
        gradient = steps.codec.unpack({spec.name: next(given) for spec in steps.packed})
        hyper = {n: next(given) for n in hyper_names}
        with steps.seeded_by(given):
            h = steps.activations({**constants, **parameters, **moved}, x)
        gradients = torch.autograd.grad(h, list(trained.values()), gradient)
        found = dict(zip(trained, gradients, strict=True))
        for name, slot in steps.waiting.items():
            found[name] = found[name] + slots[slot]
            slots[slot] = torch.zeros_like(slots[slot])
        return steps.stepped(parameters, found, moved, slots, hyper)

    inputs = steps.training_inputs(*_gradient_ports(steps))
    return steps.step("backward", function, inputs, steps.next_state())


def fuse(steps: ClientSteps) -> Step:
    """``(state, x, y, packed gradient, hyper, seed) -> state', loss, correct``: a fused step.

    Gradients are fused as in SuperSFL (https://arxiv.org/abs/2601.02092). The stem and the blocks
    are updated with ``own`` times the gradient of the heads' loss plus ``1 - own`` times the
    returned gradient; the heads are updated with the gradient of their loss. ``own`` is a
    hyper-parameter above 0 and at most 1. The graph recomputes the forward pass, as in
    :func:`backward`.
    """
    hyper_names = list(steps.optimizer.hyper)

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        parameters = {n: next(given).detach().requires_grad_() for n in steps.parameters}
        moved = {n: next(given).clone() for n in steps.statistics}
        slots = {n: next(given) for n in steps.slots}
        x, y = next(given), next(given)
        gradient = steps.codec.unpack({spec.name: next(given) for spec in steps.packed})
        hyper = {n: next(given) for n in hyper_names}
        own = next(given)
        with steps.seeded_by(given):
            h, logits = steps.call(True, {**constants, **parameters, **moved}, x)
        loss = local_loss(logits, y, steps.distill)
        trained = [n for n in parameters if not in_head(n)]
        fused = torch.autograd.grad(
            [loss, h], [parameters[n] for n in trained], [own, (1 - own) * gradient]
        )
        with torch.no_grad():
            found = {
                n: g if is_below_heads(n) else g / own for n, g in zip(trained, fused, strict=True)
            }
        state = steps.stepped(parameters, found, moved, slots, hyper)
        return *state, loss.detach(), correct(logits, y)

    inputs = steps.training_inputs(Port(steps.y, "batch"), *_gradient_ports(steps), own=("own",))
    outputs = (
        *steps.next_state(),
        *steps.results(),
    )
    return steps.step("fuse", function, inputs, outputs)


def finish(steps: ClientSteps) -> Step:
    """``(state, packed features, y, hyper, seed) -> state', loss, correct, packed gradient``.

    A step of the model's head on the device, where the labels stay. ``features.NAME`` are the
    packed outputs of the last block on the hub; ``grad.NAME`` is the gradient of the mean loss
    with respect to them. The gradient of a tensor that is tied to the stem waits in a slot, so that
    :func:`backward` makes one step with its whole gradient.
    """
    hyper_names = list(steps.optimizer.hyper)
    head = steps.head
    assert head is not None

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        parameters = {n: next(given).detach() for n in steps.parameters}
        moved = {n: next(given).clone() for n in steps.statistics}
        slots = {n: next(given) for n in steps.slots}
        trained = {n: p.requires_grad_() for n, p in parameters.items() if in_head(n)}
        for name in steps.waiting:
            parameters[name].requires_grad_()
        features = steps.codec.unpack({spec.name: next(given) for spec in steps.features})
        features = features.detach().requires_grad_()
        y = next(given)
        hyper = {n: next(given) for n in hyper_names}
        with steps.seeded_by(given):
            tensors_ = {**constants, **parameters, **moved}
            logits = steps.apply(head, True, tensors_, features).unsqueeze(0)
        loss = local_loss(logits, y)
        tied = [tensors_[name] for name in steps.waiting]
        gradients = torch.autograd.grad(loss, [features, *trained.values(), *tied])
        found = dict(zip(trained, gradients[1:], strict=False))
        for slot, part in zip(steps.waiting.values(), gradients[1 + len(trained) :], strict=True):
            slots[slot] = slots[slot] + part
        state = steps.stepped(parameters, found, moved, slots, hyper)
        packed = steps.codec.pack(gradients[0], steps.features_axis)
        back = (packed[spec.name] for spec in steps.features)
        return *state, loss.detach(), correct(logits, y), *back

    features = (
        Port(TensorSpec(f"features.{s.name}", s.dtype, s.shape), "packed") for s in steps.features
    )
    gradient = (
        Port(TensorSpec(f"grad.{s.name}", s.dtype, s.shape), "packed") for s in steps.features
    )
    inputs = steps.training_inputs(*features, Port(steps.y, "batch"), x=False)
    outputs = (
        *steps.next_state(),
        *steps.results(),
        *gradient,
    )
    return steps.step("finish", function, inputs, outputs)


def _gradient_ports(steps: ClientSteps) -> Iterator[Port]:
    for spec in steps.packed:
        yield Port(TensorSpec(f"grad.{spec.name}", spec.dtype, spec.shape), "packed")
