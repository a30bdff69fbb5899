"""Dual norms: a clean and a noise copy of every norm, and weighted means of both.

Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747) trains one model for clean
inputs and for adversarial examples. Only the norms differ: each has two copies with their own
statistics and affine parameters. A number, the robustness, then trades accuracy against
robustness at inference, without further training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.torch_internals import BatchNormBase, NormBase

_ROBUSTNESS: ContextVar[float | Tensor] = ContextVar("robustness", default=0)


class DualNorm(nn.Module):
    """Two copies of a norm: ``(1 - l) clean(h) + l noise(h)``, where :func:`robustness` sets ``l``.

    Args:
        norm: norm that both copies start from.

    Attributes:
        clean: the given norm, for clean inputs; used alone outside of :func:`robustness`.
        noise: the copy for adversarial examples.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.clean = norm
        self.noise = copy.deepcopy(norm)

    def forward(self, h: Tensor) -> Tensor:
        """``h`` normalised, of the same shape.

        Raises:
            ExportError: the norm is a batch norm in training mode and the robustness is not 0 or
                1; or the robustness is given per row, and the number of rows of ``h`` is not a
                multiple of its length.
        """
        value = _ROBUSTNESS.get()
        if not isinstance(value, Tensor):
            if value == 0:
                return _alone(self.clean, self.noise, h)
            if value == 1:
                return _alone(self.noise, self.clean, h)
        if isinstance(self.clean, BatchNormBase) and self.clean.training:
            raise ExportError(
                "a robustness between 0 and 1 would move the statistics of both copies of a batch "
                "norm by all rows; give 0 or 1 while training with batch norms"
            )
        share = _share(value, h) if isinstance(value, Tensor) else value
        mixed: Tensor = (1 - share) * self.clean(h) + share * self.noise(h)
        return mixed


def with_dual_norms(model: SplitModel) -> SplitModel:
    """A copy of a model in which each norm is a :class:`DualNorm`.

    The norm ``block.0.norm1`` becomes ``block.0.norm1.clean`` and ``block.0.norm1.noise``. Norms of
    auxiliary heads stay single: they belong to the classifier, and :meth:`SplitModel.load` finds
    heads by the name of their norm. Norms without parameters and statistics stay single as well,
    since their copies would always be equal.

    Args:
        model: a model with GroupNorm, LayerNorm, RMSNorm (of torch or transformers) or BatchNorm.

    Raises:
        ExportError: the model has no norm to copy, it has dual norms already, or a BatchNorm
            does not track statistics.
    """
    if has_dual_norms(model):
        raise ExportError("the model has dual norms already; pass the model without them")
    result = copy.deepcopy(model)
    parts = [(n, m) for n, m in result.named_modules() if n.partition(".")[0] != "aux"]
    for name, module in parts:
        if isinstance(module, BatchNormBase) and not module.track_running_stats:
            raise ExportError(
                f"{name} is a {type(module).__name__} without running statistics, which makes the "
                "answer depend on the batch; use GroupNorm, or track_running_stats=True"
            )
    duals: dict[nn.Module, DualNorm] = {}  # a shared norm stays shared
    for _, parent in parts:
        for key, norm in list(parent.named_children()):
            if is_norm(norm) and next(chain(norm.parameters(), norm.buffers()), None) is not None:
                if norm not in duals:
                    duals[norm] = DualNorm(norm)
                    duals[norm].training = norm.training
                setattr(parent, key, duals[norm])
    if not duals:
        raise ExportError(
            "there is no norm with parameters or statistics in the stem, the blocks or the head; "
            "dual norms need some, nn.GroupNorm"
        )
    return result


def has_dual_norms(module: nn.Module) -> bool:
    """Whether a module contains a :class:`DualNorm`."""
    return any(isinstance(part, DualNorm) for part in module.modules())


def noise_tensors(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers of all noise norms in a module."""
    return {
        f"{name}.{key}"
        for name, part in module.named_modules()
        if isinstance(part, DualNorm)
        for key in part.state_dict()
        if key.startswith("noise.")
    }


@contextmanager
def robustness(value: float | Tensor) -> Iterator[None]:
    """Set the weight of the noise norms inside the context; outside it is 0.

    The numbers 0 and 1 run the clean or the noise copy alone: in training the statistics of the
    other copy stay, and its gradients are zero. Any other value runs both copies.

    Args:
        value: weight of the noise norms from 0 to 1: a number; or a tensor, () for all rows or
            (rows,) per row. A tensor may be traced as an input of a graph; its values are not
            checked.

    Raises:
        ExportError: the number is not between 0 and 1, or the tensor has another shape.
    """
    if isinstance(value, Tensor):
        if value.dim() > 1:
            raise ExportError(
                f"the robustness has shape {list(value.shape)}; it must be one number, or one for "
                "each row"
            )
    elif not 0 <= value <= 1:
        raise ExportError(f"the robustness is {value}; it must be from 0 (clean) to 1 (noise)")
    before = _ROBUSTNESS.set(value)
    try:
        yield
    finally:
        _ROBUSTNESS.reset(before)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, of torch or an RMSNorm of transformers.

    RMSNorms of transformers are recognised by name, since each family has its own class.
    """
    known = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, NormBase)
    return isinstance(module, known) or type(module).__name__.endswith("RMSNorm")


def _share(value: Tensor, h: Tensor) -> Tensor:
    """The robustness in a shape that broadcasts with ``h``.

    A model may have merged rows and positions before a norm; then each row of the batch is a run
    of consecutive rows of ``h``.
    """
    value = value.to(h.dtype)
    if value.dim() == 0:
        return value
    rows, found = value.shape[0], h.shape[0]
    if found % rows:
        raise ExportError(
            f"the robustness has {rows} rows and the activations {found}; give one for each row of "
            "the batch"
        )
    each = value.unsqueeze(1).expand(rows, found // rows).reshape(-1)
    return each.reshape(-1, *[1] * (h.dim() - 1))


class _Idle(torch.autograd.Function):
    """Returns the first tensor; the gradients of all other tensors are zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, *idle: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _alone(norm: nn.Module, idle: nn.Module, h: Tensor) -> Tensor:
    """Output of one copy, with gradients of zero for the parameters of the other.

    A training step refuses parameters without a gradient. The idle parameters join at the input,
    because the next layer may change the output in place.
    """
    parameters = [p for p in idle.parameters() if p.requires_grad]
    if parameters and torch.is_grad_enabled():
        h = _Idle.apply(h, *parameters)  # type: ignore[no-untyped-call]
    result: Tensor = norm(h)
    return result
