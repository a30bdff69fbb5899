"""Verifies the graphs of Split-Mix against eager PyTorch; see :mod:`export.lowering.verify`.

The reference is the module itself in float64, with autograd and ``torch.optim``. It runs the base
networks of a mixture one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.tensors import Array
from export.bases.dual_norms import noise_tensors, robustness
from export.cutting.split_model import ClientSegment
from export.lowering.graph_files import Run
from export.steps.client_steps import ClientSteps, Step
from export.steps.losses import NO_LABEL

ROBUSTNESS = 0.3
"""Robustness of all compared graphs."""

_EPSILON, _STEP_SIZE, _LOW, _HIGH = 0.05, 0.02, -1.0, 1.0

_FLAT = 1e-3
"""Fraction of the largest gradient below which rounding may change the sign of a gradient."""


def draw_present(steps: ClientSteps, generator: torch.Generator) -> Tensor | None:
    """A random class mask (classes,) with about half of the classes, always the first one.

    Returns None if the graphs take no class mask.
    """
    if not steps.present_port():
        return None
    present = (torch.rand(steps.classes, generator=generator) < 0.5).float()
    present[0] = 1.0
    return present


def labels_among(present: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Random labels (rows,) among the classes of a mask."""
    classes = present.nonzero().flatten()
    return classes[torch.randint(len(classes), (rows,), generator=generator)]


def loss_of(logits: Tensor, y: Tensor, present: Tensor | None) -> Tensor:
    """The sum of the heads' cross-entropies over the classes of a mask, or over all classes."""
    if present is not None:
        classes = present.nonzero().flatten()
        logits, y = logits[..., classes], torch.searchsorted(classes, y)
    rows = y.reshape(-1)
    return torch.stack(
        [cross_entropy(z.reshape(-1, z.shape[-1]), rows, ignore_index=NO_LABEL) for z in logits]
    ).sum()


def compare_mix(
    steps: ClientSteps,
    step: Step,
    run: Run,
    x: Tensor,
    generator: torch.Generator,
    packed: Callable[..., tuple[str, float] | None],
) -> tuple[str, float] | None:
    """Compare ``mix_N`` with the mean of the logits of N base networks.

    Args:
        steps: steps of one base network.
        step: the graph's step.
        run: runs the lowered graph.
        x: inputs (batch, ...).
        generator: source of the parameters.
        packed: compares packed activations with the activations.

    Returns:
        Name and error of the first tensor that differs; None if none does.
    """
    bases = int(step.name.removeprefix("mix_"))
    states = [_noisy(steps.initial, generator) for _ in range(bases)]
    feeds = {
        f"bases/{n}": torch.stack([s[n] for s in states]).numpy() for n in steps.initial
    } | _scalars(steps)
    got = run(step, {**feeds, "x": x.numpy()})
    answers = []
    for base, state in enumerate(states):
        reference = _reference(steps, state).eval()
        with torch.no_grad(), robustness(ROBUSTNESS if steps.dual else 0):
            h, logits = reference(_wide(x))
        answers.append(logits)
        own = {n.removeprefix("bases."): part[base] for n, part in got.items() if n != "logits"}
        wrong = packed(steps, own, h, steps.packed) if own else None
        if wrong is not None:
            return wrong
    want = torch.stack(answers).mean(0).numpy()
    error = float(np.abs(got["logits"] - want).max(initial=0.0))
    return None if error <= 1e-4 * np.abs(want).max() + 1e-5 else ("logits", error)


def compare_attack(
    steps: ClientSteps, step: Step, run: Run, x: Tensor, generator: torch.Generator
) -> tuple[str, float] | None:
    """Compare ``attack`` with a step of projected gradient ascent.

    Args:
        steps: steps of one base network.
        step: the graph's step.
        run: runs the lowered graph.
        x: inputs (batch, ...).
        generator: source of the parameters, labels and start.

    Returns:
        Name and error of the first tensor that differs; None if none does.
    """
    state = _noisy(steps.initial, generator)
    present = draw_present(steps, generator)
    y = (
        torch.randint(steps.classes, x.shape[:1], generator=generator)
        if present is None else labels_among(present, len(x), generator)
    )  # fmt: skip
    start = x + _EPSILON * (2 * torch.rand(x.shape, generator=generator) - 1)
    scalars = {"epsilon": _EPSILON, "rate": _STEP_SIZE, "low": _LOW, "high": _HIGH}
    feeds = {n: t.numpy() for n, t in state.items()}
    feeds |= {"x": x.numpy(), "y": y.numpy(), "start": start.numpy()}
    feeds |= {n: np.asarray(v, np.float32) for n, v in scalars.items()}
    if present is not None:
        feeds["present"] = present.numpy()
    (got,) = run(step, feeds).values()
    before = start.double().requires_grad_()
    with robustness(1):
        _, logits = _reference(steps, state).eval()(before)
    (gradient,) = torch.autograd.grad(loss_of(logits, y, present), [before])
    want = (before.detach() + _STEP_SIZE * gradient.sign()).clamp(_LOW, _HIGH)
    near = torch.maximum(torch.minimum(want, x.double() + _EPSILON), x.double() - _EPSILON)
    near = near.clamp(_LOW, _HIGH)
    steep = gradient.abs() > _FLAT * gradient.abs().max()
    error = float((np.abs(got - near.numpy()) * steep.numpy()).max(initial=0.0))
    return None if error <= 1e-5 else ("x_adv", error)


def _reference(steps: ClientSteps, state: Mapping[str, Tensor]) -> ClientSegment:
    reference = copy.deepcopy(steps.segment).double()
    reference.load_state_dict(dict(state), strict=False)
    return reference


def _noisy(state: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Perturb the tensors of a state, so that copies differ; variances stay above zero."""
    return {
        n: t * (1 + 0.2 * torch.rand(t.shape, generator=generator))
        + (0 if n.endswith("running_var") else 0.05 * torch.randn(t.shape, generator=generator))
        for n, t in state.items()
    }


def _scalars(steps: ClientSteps) -> dict[str, Array]:
    return {"robustness": np.asarray(ROBUSTNESS, np.float32)} if steps.dual else {}


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def idle(steps: ClientSteps, graph: str) -> set[str]:
    """Parameters that a graph does not train: for ``train`` those of the noise norms."""
    return noise_tensors(steps.segment) if graph == "train" else set()
