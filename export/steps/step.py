"""A step: one graph of a bundle as a function of tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from edge_sdk.bundle.manifest import Port

Tensors = dict[str, Tensor]
"""Tensors by name."""


@dataclass(frozen=True)
class Step:
    """A traceable step, and the same step in eager PyTorch.

    Attributes:
        name: name of the graph.
        function: takes the constants and the inputs, both by name, and returns the outputs by name.
            It is traced into the graph.
        inputs: ports of the inputs, state first.
        outputs: ports of the outputs, state first; a state output is called ``next/NAME``.
        constants: tensors that are the same in every call, such as frozen weights.
        limits: upper bounds of symbolic dimensions by name, if there are any.
        reference: the step in eager PyTorch, for verification: with the model's own code, autograd
            and ``torch.optim``. It takes the inputs by name, floats in float64, and returns the
            outputs by name in float64; packed outputs as they are before rounding, and what else is
            to be compared. None for steps that are not exported.
        verified_at: values of hyper-parameters for verification, by name; those of the optimizer
            are not among them.
    """

    name: str
    function: Callable[[Tensors, Tensors], Tensors]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    reference: Callable[[Tensors], Tensors] | None = None
    verified_at: Mapping[str, float] = field(default_factory=dict)
