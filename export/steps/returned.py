"""Graphs for gradients that the hub returns: ``activate`` and ``backward``.

A device sends the activations of a batch, and updates its segment with the returned gradient.
"""

from __future__ import annotations

import torch

from export.steps.client_steps import ClientSteps
from export.steps.eager import EagerSegment
from export.steps.step import Step, Tensors
from export.tensor_names import is_below_heads


def activate(steps: ClientSteps) -> Step:
    """``(parameters, statistics, x, seed) -> packed activations``, in training mode.

    These are the activations that :func:`backward` differentiates. Only ``backward`` updates the
    running statistics.
    """

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, _ = steps.training_tensors(constants, given, ())
        with steps.random(given):
            return steps.pack(steps.activations(tensors, given["x"]))

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given, training=True)
        with torch.no_grad():
            return eager.unrounded(eager.activations())

    inputs = [*steps.inference_ports(), *steps.seed_port()]
    return steps.step("activate", function, inputs, steps.packed_ports(), reference)


def backward(steps: ClientSteps) -> Step:
    """``(state, x, packed gradient, hyper, seed) -> state'``: a step on the returned gradient.

    The gradient is that of a loss on the hub with respect to the activations, packed like these:
    ``grad.NAME`` is the gradient of ``NAME``. The graph recomputes the forward pass in training
    mode, with the seed of ``activate``. The heads do not contribute to that loss, so their
    parameters and slots stay. A tensor that the model's head on the device reads as well is updated
    with both parts of its gradient; :func:`export.steps.u_shaped.finish` has put one into a slot.
    """
    names = [n for n in steps.parameters if is_below_heads(n)]

    def used(given: Tensors) -> Tensors:
        return {f"next/{slot}": torch.zeros_like(given[slot]) for slot in steps.waiting.values()}

    def function(constants: Tensors, given: Tensors) -> Tensors:
        tensors, own = steps.training_tensors(constants, given, names)
        gradient = steps.unpack(given, "grad.", steps.packed)
        with steps.random(given):
            h = steps.activations(tensors, given["x"])
        gradients = dict(
            zip(names, torch.autograd.grad(h, [own[n] for n in names], gradient), strict=True)
        )
        for name, slot in steps.waiting.items():
            gradients[name] = gradients[name] + given[slot]
        return {**steps.stepped(own, gradients, given), **used(given)}

    def reference(given: Tensors) -> Tensors:
        eager = EagerSegment(steps, given, is_below_heads, training=True)
        gradient = steps.unpack(given, "grad.", steps.packed)
        eager.activations().backward(gradient)  # type: ignore[no-untyped-call]
        for name, slot in steps.waiting.items():
            part = eager.parameters[name].grad
            assert part is not None
            part += given[slot]
        return {**eager.stepped(), **used(given)}

    inputs = steps.training_ports(*steps.packed_ports("grad."))
    return steps.step("backward", function, inputs, steps.next_state_ports(), reference)
