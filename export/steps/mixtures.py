"""Step graphs for Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747).

A client segment is one of several *base networks* of the same structure, which share one set of
graphs. ``mix_N`` computes the answer of N bases in one pass. ``attack`` makes adversarial examples,
and ``harden`` trains on them through the noise norms (see :mod:`export.bases.dual_norms`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.dual_norms import robustness
from export.bases.vmapped import over_bases
from export.errors import ExportError
from export.steps.client_steps import ClientSteps, Step
from export.steps.losses import correct, local_loss, masked


def mix(steps: ClientSteps, bases: int) -> Step:
    """``(states of some bases, x) -> logits, packed activations``, in one pass.

    Logits are the mean over the bases, (heads, batch, classes), or (heads, batch, positions,
    vocabulary). Activations are packed per base, (bases, ...), unless bases are whole on the
    device.

    Args:
        steps: steps of one base.
        bases: number of bases to mix; the tensors of their states are (bases, ...).
    """

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        stacked = {n: next(given) for n in steps.initial}
        x = next(given)

        def one(own: dict[str, Tensor]) -> tuple[Tensor, ...]:
            h, logits = steps.call(False, {**constants, **own}, x)
            return (logits,) if steps.segment.whole else (logits, *steps.pack(h))

        with steps.robust(given):
            logits, *parts = over_bases(one, stacked)
        return logits.mean(0), *parts

    inputs = (
        *(
            Port(TensorSpec(f"bases/{n}", "float32", (bases, *t.shape)), "bases")
            for n, t in steps.initial.items()
        ),
        Port(steps.x, "batch"),
        *steps.robustness_port(),
    )
    packed = (
        Port(TensorSpec(f"bases.{s.name}", s.dtype, (bases, *s.shape)), "packed")
        for s in steps.packed
        if not steps.segment.whole
    )
    return steps.step(f"mix_{bases}", function, inputs, (steps.logits_port(), *packed))


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

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        named = {n: next(given) for n in steps.initial}
        x, y = next(given), next(given)
        present = [next(given) for _ in steps.present_port()]
        start = next(given).detach().requires_grad_()
        epsilon, step_size, low, high = given
        with robustness(1):
            _, logits = steps.call(False, {**constants, **named}, start)
        loss = local_loss(masked(logits, *present), y)
        (gradient,) = torch.autograd.grad(loss, [start])
        with torch.no_grad():
            x_adv = start.detach() + step_size * gradient.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon)
            return (torch.minimum(torch.maximum(x_adv, low), high),)

    inputs = (
        *steps.inputs(),
        Port(steps.y, "batch"),
        *steps.present_port(),
        Port(TensorSpec("start", steps.x.dtype, steps.x.shape), "batch"),
        *(Port(TensorSpec(n, "float32", ()), "hyper") for n in ("epsilon", "rate", "low", "high")),
    )
    result = Port(TensorSpec("x_adv", steps.x.dtype, steps.x.shape), "result")
    return steps.step("attack", function, inputs, (result,))


def harden(steps: ClientSteps) -> Step:
    """``(state, x, y, x_adv, hyper, robustness) -> state', loss, correct, packed activations``.

    A training step on ``(1 - robustness) * loss(x) + robustness * loss(x_adv)``, with the clean
    norms for ``x`` and the noise norms for ``x_adv``. The activations of both are packed; those of
    ``x_adv`` are called ``noise.NAME``.
    """
    hyper_names = list(steps.optimizer.hyper)

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        parameters = {n: next(given).detach().requires_grad_() for n in steps.parameters}
        moved = {n: next(given).clone() for n in steps.statistics}
        slots = {n: next(given) for n in steps.slots}
        x, y = next(given), next(given)
        present = [next(given) for _ in steps.present_port()]
        x_adv = next(given)
        hyper = {n: next(given) for n in hyper_names}
        weight = next(given)
        named = {**constants, **parameters, **moved}
        with steps.seeded_by(given):
            with robustness(0):
                h, logits = steps.call(True, named, x)
            with robustness(1):
                h_adv, logits_adv = steps.call(True, named, x_adv)
        logits = masked(logits, *present)
        clean = local_loss(logits, y)
        loss = (1 - weight) * clean + weight * local_loss(masked(logits_adv, *present), y)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        found = dict(zip(parameters, gradients, strict=True))
        state = steps.stepped(parameters, found, moved, slots, hyper)
        return *state, loss.detach(), correct(logits, y), *steps.pack(h), *steps.pack(h_adv)

    added = (
        *steps.present_port(),
        Port(TensorSpec("x_adv", steps.x.dtype, steps.x.shape), "batch"),
    )
    inputs = steps.training_inputs(Port(steps.y, "batch"), *added, own=("robustness",))
    noise = (Port(TensorSpec(f"noise.{s.name}", s.dtype, s.shape), "packed") for s in steps.packed)
    outputs = (*steps.next_state(), *steps.results(), *steps.packed_ports(), *noise)
    return steps.step("harden", function, inputs, outputs)
