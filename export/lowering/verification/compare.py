"""Compares outputs of graphs: mathematics to 1e-9, and runtimes within rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from export.lowering.verification.traced import Outputs
from export.steps.step import Tensors

EXACT = 1e-9
"""Largest relative error of a traced graph in float64."""

_SMALL = 1e-3
"""Scale of a tensor that is nearly zero, as a fraction of the largest of its kind."""

MARGIN = 64
"""Rounding of a runtime as a multiple of that of the same graph in float32 in PyTorch.

A runtime adds in another order and has its own exponentials; its rounding is of the same size. A
wrong graph differs by much more: one percent is ten thousand times the rounding of a product.
"""

_ULP = 2.0**-23
_ULPS = 8


def mathematical_error(got: Outputs, want: Tensors) -> tuple[str, float] | None:
    """The first output of a traced graph in float64 that differs from its reference.

    The bound is :data:`EXACT` times the largest magnitude in the tensor. A tensor that is zero up
    to rounding (the gradient of a key's bias) has no scale of its own, and the bound is relative to
    :data:`_SMALL` times the largest of its kind. A code differs if it is not the reference rounded,
    except where the reference is within the bound of a tie.

    Args:
        got: outputs of the graph.
        want: outputs of the reference in float64, packed ones before rounding.

    Returns:
        Name and largest error; None if the outputs are equal.
    """
    scales = _scales(want)
    for name in want:
        if name not in got.unrounded:  # a hidden value that the graph does not compute
            return name, float("nan")
        bound = EXACT * max(_largest(want[name]), _SMALL * scales[_kind(name)])
        found = got.unrounded[name].double()
        if name not in got.values and found.numel() == want[name].numel():
            found = found.reshape(want[name].shape)  # what a graph hides may have another shape
        error = _largest(found - want[name])
        if not error <= bound:
            return name, error
        if name in got.values and got.values[name].dtype in _HALF_STEPS:
            excess = _beyond_rounding(got.values[name], want[name], torch.tensor(bound))
            if not excess <= 0:
                return name, excess
    return None


@dataclass(frozen=True)
class Expected:
    """An output of a runtime as it should be.

    Attributes:
        value: its value; in float32, but for packed outputs, which are in float64 before rounding.
        bound: largest difference, in a shape that broadcasts.
    """

    value: Tensor
    bound: Tensor


def expected(
    ports: tuple[Port, ...], wide: Outputs, narrow: Outputs, axes: Mapping[str, int]
) -> dict[str, Expected]:
    """The outputs of a runtime and the bounds of their rounding, by name.

    The bound of a channel is :data:`MARGIN` times the largest rounding error in it of the same
    graph in float32 in PyTorch, or that of the median channel if it is larger; plus a few units in
    the last place of its values, and one of the largest value of the tensor's kind.

    Args:
        ports: ports of the outputs.
        wide: outputs of the traced graph in float64.
        narrow: outputs of the traced graph in float32, in PyTorch.
        axes: axis of the channels by name of the output; 0 if it is not among them.
    """
    scales = _scales(wide.unrounded)
    found = {}
    for port in ports:
        name = port.spec.name
        want, rounded = wide.unrounded[name], narrow.unrounded[name].double()
        bound = _rounding(want, rounded, axes.get(name, 0)) + _ULP * scales[_kind(name)]
        packed = wide.values[name].dtype in _HALF_STEPS
        found[name] = Expected(want if packed else want.float(), bound)
    return found


def rounding_error(
    got: Mapping[str, Tensor], want: Mapping[str, Expected]
) -> tuple[str, float] | None:
    """The first output of a runtime that differs from the traced graph by more than rounding.

    Returns:
        Name and largest error; None if the outputs are within rounding.
    """
    for name, right in want.items():
        if got[name].dtype in _HALF_STEPS:
            excess = _beyond_rounding(got[name], right.value, right.bound)
            if not excess <= 0:
                return name, excess
            continue
        difference = (got[name].double() - right.value).abs()
        if not bool((difference <= right.bound).all()):
            return name, _largest(difference)
    return None


def _rounding(want: Tensor, rounded: Tensor, axis: int) -> Tensor:
    """Bound of the rounding error of each channel, in a shape that broadcasts."""
    error = (rounded - want).abs()
    if want.dim() == 0:
        return MARGIN * error + _ULPS * _ULP * want.abs()
    others = [d for d in range(want.dim()) if d != axis]
    by_channel = error.amax(others, keepdim=True) if others else error
    size = want.abs().amax(others, keepdim=True) if others else want.abs()
    typical = by_channel.median() if by_channel.numel() else torch.zeros(())
    return MARGIN * torch.maximum(by_channel, typical) + _ULPS * _ULP * size


_HALF_STEPS = {torch.int8: 0.5, torch.uint8: 0.5, torch.float16: None}
"""Half of the distance between two codes, by dtype; None if it depends on the value."""


def _beyond_rounding(codes: Tensor, want: Tensor, bound: Tensor) -> float:
    """How far codes are from being the rounded values, beyond a bound of the values; 0 if not."""
    half = _HALF_STEPS[codes.dtype]
    steps: Tensor | float = _half_steps_of_float16(want) if half is None else half
    beyond = (codes.double() - want).abs() - steps - bound
    return max(beyond.max().item(), 0.0) if beyond.isfinite().all() else float("nan")


def _half_steps_of_float16(values: Tensor) -> Tensor:
    """Half of the distance of neighbours in float16 at some values."""
    exponents = torch.frexp(values.abs()).exponent.clamp(min=-13)
    return torch.ldexp(torch.ones_like(values), exponents - 12)


def _scales(tensors: Tensors) -> dict[str, float]:
    """The largest magnitude among the tensors of a kind."""
    scales: dict[str, float] = {}
    for name, tensor in tensors.items():
        kind = _kind(name)
        scales[kind] = max(scales.get(kind, 0.0), _largest(tensor))
    return scales


def _kind(name: str) -> str:
    """Kind of an output: parameters and statistics, slots of one kind, or the output alone."""
    if not name.startswith("next/"):
        return name
    return name.rpartition("/")[0]


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
