"""Runs base networks of one structure in one pass over their stacked tensors, (bases, ...).

``torch.vmap`` turns the networks into batched matrix products and grouped convolutions. Some of its
rules fix the number of rows, which must stay symbolic in graphs for devices. This module replaces
those rules. The channels of all networks are concatenated, (rows, bases * channels, ...), so a
convolution becomes one grouped convolution, and nothing is copied between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")


def over_bases(
    function: Callable[[dict[str, Tensor]], Result], tensors: Mapping[str, Tensor]
) -> Result:
    """Apply a function to the tensors of every network, in one pass.

    Args:
        function: function of the tensors of one network by name; it computes no gradients.
        tensors: tensors (bases, ...) by name.

    Returns:
        The stacked results: a tensor (bases, ...), or several.
    """

    def one(own: dict[str, Tensor]) -> Result:
        with _SymbolicRows(), sdpa_kernel(SDPBackend.MATH):  # fused kernels have no rule
            return function(own)

    result: Result = torch.vmap(one)(dict(tensors))
    return result


class _SymbolicRows(TorchFunctionMode):
    """While active, replaces functions whose rule in ``torch.vmap`` fixes the number of rows."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(function, function)
        return rule(*args, **(kwargs or {}))


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        def call(h: Tensor, bases: int, weight: Tensor, bias: Tensor | None) -> Any:
            return function(h, weight, bias, stride, padding, dilation, groups * bases)

        return _apply(call, input, weight, bias, shared=groups == 1)

    return rule


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    def call(h: Tensor, bases: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(h, num_groups * bases, weight, bias, eps)

    return _apply(call, input, weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    assert not training, "statistics of a batch are not for networks side by side"

    def call(h: Tensor, bases: int, *own: Tensor | None) -> Tensor:
        mean, var, weight, bias = own
        return F.batch_norm(h, mean, var, weight, bias, False, momentum, eps)

    return _apply(call, input, running_mean, running_var, weight, bias)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    h: Tensor = _Products.apply(input, weight)  # type: ignore[no-untyped-call]
    return h if bias is None else h + bias


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    h: Tensor = _LastAxis.apply(input, tuple(normalized_shape), eps)  # type: ignore[no-untyped-call]
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    h: Tensor = _Tables.apply(input, weight)  # type: ignore[no-untyped-call]
    return h


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    h: Tensor = _Joined.apply(dim, *tensors)  # type: ignore[no-untyped-call]
    return h


def _by_channel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _apply(lambda h, bases: function(h, *args, **kwargs), input)

    return rule


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    if mode == "constant":  # may pad the axis of the channels
        return F.pad(input, pad, mode, value)
    return _apply(lambda h, bases: F.pad(h, pad, mode), input)


def _apply(
    call: Callable[..., Tensor], h: Tensor, *own: Tensor | None, shared: bool = False
) -> Tensor:
    result: Tensor = _SideBySide.apply(call, shared, h, *own)  # type: ignore[no-untyped-call]
    return result


class _Rule(torch.autograd.Function):
    """Base class of functions with their own rule for ``torch.vmap``, without gradients."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing, since there are no gradients."""


class _SideBySide(_Rule):
    """A layer on activations (rows, bases * channels, ...), with the concatenated tensors of bases.

    With ``shared``, activations that all bases share are not repeated per base.
    """

    @staticmethod
    def forward(
        call: Callable[..., Tensor], shared: bool, h: Tensor, *own: Tensor | None
    ) -> Tensor:
        return call(h, 1, *own)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        call: Callable[..., Tensor],
        shared: bool,
        h: Tensor,
        *own: Tensor | None,
    ) -> tuple[Tensor, int]:
        bases: int = info.batch_size
        _, _, axis, *axes = in_dims
        tensors = [
            None if t is None
            else t.movedim(a, 0).flatten(0, 1) if a is not None
            else t.repeat(bases, *[1] * (t.dim() - 1))
            for t, a in zip(own, axes, strict=True)
        ]  # fmt: skip
        if axis is None and shared:
            h = call(h, 1, *tensors)
        else:
            if axis is None:
                h = h.unsqueeze(1).expand(h.shape[0], bases, *h.shape[1:])
            else:
                h = h.movedim(axis, 1)
            h = call(h.flatten(1, 2), bases, *tensors)
        return h.reshape(h.shape[0], bases, h.shape[1] // bases, *h.shape[2:]), 1


class _Products(_Rule):
    """Linear layers without bias, with the matrices of all bases."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight)

    @staticmethod
    def vmap(info: Any, in_dims: Any, h: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        bases: int = info.batch_size
        if in_dims[1] is None:
            return F.linear(h.movedim(in_dims[0], 0), weight), 0
        weight = weight.movedim(in_dims[1], 0)
        if in_dims[0] is None:  # one product for all bases
            h = F.linear(h, weight.flatten(0, 1))
            return h.reshape(*h.shape[:-1], bases, h.shape[-1] // bases), h.dim() - 1
        h = h.movedim(in_dims[0], 0)
        sizes = h.shape[1:-1]
        return torch.bmm(h.flatten(1, -2), weight.mT).reshape(bases, *sizes, -1), 0


class _LastAxis(_Rule):
    """Layer norm without weights, which treats the axis of the bases like rows."""

    @staticmethod
    def forward(h: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        return F.layer_norm(h, shape, None, None, eps)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, h: Tensor, shape: tuple[int, ...], eps: float
    ) -> tuple[Tensor, int]:
        return F.layer_norm(h.movedim(in_dims[0], 0), shape, None, None, eps), 0


class _Tables(_Rule):
    """Look-ups in the concatenated embedding tables of all bases."""

    @staticmethod
    def forward(rows: Tensor, table: Tensor) -> Tensor:
        return F.embedding(rows, table)

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, table: Tensor) -> tuple[Tensor, int]:
        bases: int = info.batch_size
        if in_dims[1] is None:
            return F.embedding(rows.movedim(in_dims[0], 0), table), 0
        table = table.movedim(in_dims[1], 0)
        first = torch.arange(bases, device=rows.device) * table.shape[1]
        rows = rows.unsqueeze(0) if in_dims[0] is None else rows.movedim(in_dims[0], 0)
        rows = rows + first.reshape(bases, *[1] * (rows.dim() - 1))
        return F.embedding(rows, table.flatten(0, 1)), 0


class _Joined(_Rule):
    """Concatenation per base; tensors that all bases share are repeated."""

    @staticmethod
    def forward(dim: int, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim)

    @staticmethod
    def vmap(info: Any, in_dims: Any, dim: int, *tensors: Tensor) -> tuple[Tensor, int]:
        repeated = [
            t.expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in zip(tensors, in_dims[1:], strict=True)
        ]
        return torch.cat(repeated, dim if dim < 0 else dim + 1), 0


_RULES: dict[Any, Callable[..., Tensor]] = {
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.pad: _pad,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    **{f: _convolution(f) for f in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{
        f: _by_channel(f)
        for f in (
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_max_pool1d,
            F.adaptive_max_pool2d,
            F.avg_pool1d,
            F.avg_pool2d,
            F.avg_pool3d,
            F.interpolate,
            F.max_pool1d,
            F.max_pool2d,
            F.max_pool3d,
        )
    },
}
