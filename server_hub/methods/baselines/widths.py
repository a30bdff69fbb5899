"""Widths of the models of HeteroFL and FjORD, and the operations that a width takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.narrow import narrow
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.planning.flops import flops_per_row
from export.steps.step import Step, Tensors


def widths_within(
    model: SplitModel, budgets: Mapping[str, float], widths: Sequence[float], example: Tensor
) -> dict[str, float]:
    """Return the largest of ``widths`` that each tier can train, by name of the tier.

    Args:
        model: a model that :func:`narrow` takes.
        budgets: FLOPs per example of a training step, by tier, see :func:`step_flops`.
        widths: widths to choose from.
        example: inputs (batch, ...) like those on the devices.

    Raises:
        ExportError: there are no widths, the smallest width exceeds the budget of a tier, or
            :func:`narrow` refuses the model at one of the widths.
    """
    if not widths:
        raise ExportError("there are no widths to choose from; give some, [0.5, 1.0]")
    needs = {w: step_flops(narrow(model, w, example), example) for w in sorted(set(widths))}
    least = min(needs)
    chosen = {}
    for tier, budget in budgets.items():
        if needs[least] > budget:
            raise ExportError(
                f"tier {tier!r} has {budget:.6g} FLOPs per example, and the smallest width, "
                f"{least:g}, takes {needs[least]:.6g}; add a smaller width or raise its budget"
            )
        chosen[tier] = max(w for w, need in needs.items() if need <= budget)
    return chosen


def step_flops(model: SplitModel, example: Tensor) -> float:
    """Return the FLOPs per example of a training step of the whole model, without auxiliary heads.

    Counts matrix products and convolutions, forward and backward, like
    ``torch.utils.flop_counter``.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    model = copy.deepcopy(model).train()

    def function(constants: Tensors, given: Tensors) -> Tensors:
        trained = {n: constants[n].detach().requires_grad_() for n in names}
        logits = functional_call(model, {**constants, **trained}, (given["x"],))
        torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
        return {}

    dtype = str(example.dtype).removeprefix("torch.")
    x = Port(TensorSpec("x", dtype, ("batch", *example.shape[1:])), "batch")
    step = Step("train", function, (x,), (), {n: t.detach() for n, t in tensors.items()})
    return flops_per_row(step)
