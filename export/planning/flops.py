"""Counts the floating-point operations of a step."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from export.steps.step import Step, Tensors
from export.torch_internals import ShapesOnly, without_onednn

_ROWS = 2
"""Rows of the counted batch; a batch norm in training mode needs more than one."""


class _Total:
    """Replaces torch's module tracker and assigns all operations to one module.

    The tracker's hooks fail in ``autograd.grad`` if a trained tensor is an argument of a module,
    as the token table is an argument of a :class:`export.cutting.heads.TokenHead`.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def flops_per_row(step: Step, length: int = 1) -> float:
    """FLOPs of a step per example, counted in eager mode on tensors without data.

    Args:
        step: step to count.
        length: size of the dimension ``seq``, if the step has one.
    """
    sizes = {"batch": _ROWS, "seq": length}
    with ShapesOnly() as shapes:
        constants: Tensors = {n: shapes.like(t) for n, t in step.constants.items()}
        inputs = {
            port.spec.name: torch.zeros(
                [sizes[n] if isinstance(n, str) else n for n in port.spec.shape],
                dtype=getattr(torch, port.spec.dtype),
            )
            for port in step.inputs
        }
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Total()  # type: ignore[assignment]
        # exported graphs have no fused LSTM, and its operations would not be counted
        with without_onednn(), counter:
            step.function(constants, inputs)
    return counter.get_total_flops() / _ROWS
