"""Finds the module that makes the export of a segment fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.cutting.calls import called, copied_buffers, recorded
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import ClientSegment
from export.errors import ExportError
from export.steps.step import Step, Tensors
from export.torch_internals import flatten, unflatten


def find_culprit(
    segment: ClientSegment,
    example: Tensor,
    lower: Callable[[Step], object],
    whole: ExportError,
) -> str | None:
    """The module whose training step cannot be lowered alone, and why: ``pool is a Pool: ...``.

    Modules are tried in the order in which their calls return, so inner modules come first. Several
    may fail. The first whose reason is that of the whole step is named, else the first of all.

    Args:
        segment: segment whose export failed.
        example: inputs (batch, ...) of the segment.
        lower: lowers a step, or raises :class:`ExportError`.
        whole: error of the whole step.

    Returns:
        Name and class of the module with its own reason; None if every module can be lowered
        alone.
    """
    first = None
    with torch.no_grad(), recorded(segment) as calls:
        functional_call(segment, copied_buffers(segment), (example,))
    for name in calls.finished:
        module, arguments = calls.entered[name]
        if name:
            try:
                lower(_alone(module, arguments, len(example)))
            except ExportError as error:
                found = f"{called(name, module)}: {error}"
                if str(error) == str(whole):
                    return found
                first = first or found
    return first


def _alone(module: nn.Module, arguments: tuple[Any, dict[str, Any]], rows: int) -> Step:
    """A step that runs one module forward and backward on inputs like its recorded arguments."""
    leaves, layout = flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    parameters = dict(module.named_parameters())
    buffers = copied_buffers(module)

    def function(constants: Tensors, inputs: Tensors) -> Tensors:
        own = {name: tensor.clone() for name, tensor in constants.items()}  # statistics change
        tensors = tuple(
            t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs.values()
        )
        given = list(leaves)
        for place, tensor in zip(places, tensors[len(parameters) :], strict=True):
            given[place] = tensor
        args, kwargs = unflatten(given, layout)
        own |= dict(zip(parameters, tensors, strict=False))
        with SeededDropout(torch.zeros((), dtype=torch.int64)):
            result = functional_call(module, own, tuple(args), kwargs)
        results = [
            torch.view_as_real(t) if t.is_complex() else t
            for t in flatten(result)[0]
            if isinstance(t, Tensor)
        ]
        loss = torch.stack([(t * t).sum() for t in results]).sum()
        wanted = [t for t in tensors if t.requires_grad]
        if not loss.requires_grad or not wanted:
            return {"loss": loss}
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return {"loss": loss.detach()} | {
            f"gradient{i}": g for i, g in enumerate(gradients) if g is not None
        }

    def port(number: int, tensor: Tensor, shape: tuple[int | str, ...]) -> Port:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Port(TensorSpec(f"t{number}", dtype, shape), "batch")

    inputs = [port(i, p, tuple(p.shape)) for i, p in enumerate(parameters.values())]
    for place in places:
        leaf = leaves[place]
        batched = leaf.dim() > 0 and leaf.shape[0] == rows
        shape = ("batch", *leaf.shape[1:]) if batched else tuple(leaf.shape)
        inputs.append(port(len(inputs), leaf, shape))
    return Step("module", function, tuple(inputs), (), buffers)
