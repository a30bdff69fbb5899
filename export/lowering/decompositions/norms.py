"""Norms and their gradients, with few passes over the activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def native_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    hxw: int,
    group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm; also returns mean and reciprocal deviation (N, G) for the backward pass."""
    grouped_NGL = x.reshape(x.shape[0], group, -1)
    mean_NG1 = grouped_NGL.mean(2, keepdim=True)
    centred_NGL = grouped_NGL - mean_NG1
    rstd_NG1 = ((centred_NGL * centred_NGL).mean(2, keepdim=True) + eps).rsqrt()
    scale_NGD, shift_NGD = rstd_NG1, -mean_NG1 * rstd_NG1
    if weight is not None:
        weight_1GD = weight.reshape(1, group, -1)
        scale_NGD, shift_NGD = scale_NGD * weight_1GD, shift_NGD * weight_1GD
    if bias is not None:
        shift_NGD = shift_NGD + bias.reshape(1, group, -1)
    x_NGDL = x.reshape(x.shape[0], group, c // group, hxw)
    y_NGDL = x_NGDL * scale_NGD.unsqueeze(3) + shift_NGD.unsqueeze(3)
    return y_NGDL.reshape(x.shape), mean_NG1.squeeze(2), rstd_NG1.squeeze(2)


def group_norm_by_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    hxw: int,
    group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm by LayerNorm, which ONNX Runtime computes in one pass with its statistics."""
    if not isinstance(hxw, int):
        return native_group_norm(x, weight, bias, n, c, hxw, group, eps)
    length = c // group * hxw
    grouped_NGL = x.reshape(x.shape[0], group, length)
    y_NGL, mean_NG1, rstd_NG1 = aten.native_layer_norm.default(
        grouped_NGL, [length], None, None, eps
    )
    y_NCL = y_NGL.reshape(x.shape[0], c, hxw)
    if weight is not None:
        y_NCL = y_NCL * weight.reshape(1, c, 1)
    if bias is not None:
        y_NCL = y_NCL + bias.reshape(1, c, 1)
    return y_NCL.reshape(x.shape), mean_NG1.squeeze(2), rstd_NG1.squeeze(2)


def native_group_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    hxw: int,
    group: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of GroupNorm.

    All gradients are linear in two sums per channel, of ``g x`` and of ``g``. So
    ``grad_x = a g + b x + c``, with coefficients for each example and channel, takes few passes
    over the activations.
    """
    x_NGDL = x.reshape(x.shape[0], group, c // group, hxw)
    g_NGDL = grad_out.reshape(x_NGDL.shape)
    mean_NG1, rstd_NG1 = mean.unsqueeze(2), rstd.unsqueeze(2)
    gx_NGD, g_NGD = (g_NGDL * x_NGDL).sum(3), g_NGDL.sum(3)
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        weighted_gx_NGD, weighted_g_NGD, a_NGD = gx_NGD, g_NGD, rstd_NG1
        if weight is not None:
            weight_1GD = weight.reshape(1, group, -1)
            weighted_gx_NGD, weighted_g_NGD = gx_NGD * weight_1GD, g_NGD * weight_1GD
            a_NGD = rstd_NG1 * weight_1GD
        gx_NG1 = weighted_gx_NGD.sum(2, keepdim=True) * (1 / (hxw * (c // group)))
        g_NG1 = weighted_g_NGD.sum(2, keepdim=True) * (1 / (hxw * (c // group)))
        b_NG1 = (g_NG1 * mean_NG1 - gx_NG1) * rstd_NG1 * rstd_NG1 * rstd_NG1
        c_NG1 = -b_NG1 * mean_NG1 - g_NG1 * rstd_NG1
        affine_NGDL = x_NGDL * b_NG1.unsqueeze(3) + c_NG1.unsqueeze(3)
        grad_x = (g_NGDL * a_NGD.unsqueeze(3) + affine_NGDL).reshape(x.shape)
    if output_mask[1]:
        grad_weight = ((gx_NGD - g_NGD * mean_NG1) * rstd_NG1).sum(0).reshape(-1)
    if output_mask[2]:
        grad_bias = g_NGD.sum(0).reshape(-1)
    return grad_x, grad_weight, grad_bias


def native_layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    normalized_shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of LayerNorm."""
    inner = list(range(x.dim() - len(normalized_shape), x.dim()))
    outer = list(range(inner[0]))
    normalised = (x - mean) * rstd
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        g = grad_out if weight is None else grad_out * weight
        correction = normalised * (g * normalised).mean(inner, keepdim=True)
        grad_x = rstd * (g - g.mean(inner, keepdim=True) - correction)
    if output_mask[1]:
        product = grad_out * normalised
        grad_weight = product.sum(outer) if outer else product
    if output_mask[2]:
        grad_bias = grad_out.sum(outer) if outer else grad_out.clone()
    return grad_x, grad_weight, grad_bias


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm, which updates the running statistics in place in training mode.

    Also returns mean and reciprocal deviation of the batch (C) for the backward pass; both are
    empty in evaluation mode.
    """
    if not training:
        return batch_norm_eval(x, weight, bias, running_mean, running_var, momentum, eps)
    y, mean, rstd, variance = _batch_norm(x, weight, bias, eps)
    count = _count(x)
    unbiased = variance * (count / (count - 1))
    running_mean.copy_(running_mean * (1 - momentum) + mean * momentum)
    running_var.copy_(running_var * (1 - momentum) + unbiased * momentum)
    return y, mean, rstd


def batch_norm_no_stats(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm without running statistics, which always normalises by the batch."""
    return _batch_norm(x, weight, bias, eps)[:3]


def batch_norm_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm in evaluation mode: one factor and one summand per channel."""
    factor = (running_var + eps).rsqrt()
    if weight is not None:
        factor = factor * weight
    summand = -running_mean * factor
    if bias is not None:
        summand = summand + bias
    y = x * _per_channel(factor, x) + _per_channel(summand, x)
    return y, x.new_empty(0), x.new_empty(0)


def native_batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of BatchNorm; in training mode they include those of the batch's statistics."""
    if training:
        assert save_mean is not None
        assert save_rstd is not None
        mean, rstd = save_mean, save_rstd
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = running_mean, (running_var + eps).rsqrt()
    all_but_channels = [0, *range(2, x.dim())]
    factor = rstd if weight is None else rstd * weight
    if not training and not output_mask[1]:
        grad_bias = grad_out.sum(all_but_channels) if output_mask[2] else None
        return (grad_out * _per_channel(factor, x) if output_mask[0] else None), None, grad_bias
    centred = x - _per_channel(mean, x)
    grad_weight = (grad_out * centred).sum(all_but_channels) * rstd
    grad_bias = grad_out.sum(all_but_channels)
    grad_x = None
    if output_mask[0]:
        grad_x = grad_out * _per_channel(factor, x)
        if training:
            share = factor / _count(x)
            slope, shift = -share * rstd * grad_weight, -share * grad_bias
            grad_x = grad_x + (centred * _per_channel(slope, x) + _per_channel(shift, x))
    return grad_x, grad_weight if output_mask[1] else None, grad_bias if output_mask[2] else None


def weight_norm_backward(
    grad_weight: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the direction ``v`` and the length ``g`` of ``weight = g v / |v|``.

    Norms are over all dimensions but ``dim``, and have size 1 in the others.
    """
    others = [i for i in range(v.dim()) if i != dim % v.dim()]
    norms, scale = norms.reshape(g.shape), g / norms.reshape(g.shape)
    along = (grad_weight * v).sum(others, keepdim=True) / norms
    return scale * (grad_weight - v * (along / norms)), along


def vector_norm(
    x: Tensor,
    order: float = 2,
    dims: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Euclidean norm over ``dims``, all if none are given; ExecuTorch has no operator for it.

    Returns ``NotImplemented`` for norms of other orders, which keeps the operator.
    """
    if order != 2 or dtype not in (None, x.dtype):
        return NotImplemented
    squares = x * x
    return squares.sum(dims or list(range(x.dim())), keepdim=keepdim).sqrt()


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and mean, reciprocal deviation and biased variance of the batch, each (C)."""
    all_but_channels = [0, *range(2, x.dim())]
    # not as means: XNNPACK has none over the batch
    count = _count(x)
    mean = x.sum(all_but_channels) / count
    centred = x - _per_channel(mean, x)
    variance = (centred * centred).sum(all_but_channels) / count
    rstd = (variance + eps).rsqrt()
    y = centred * _per_channel(rstd if weight is None else rstd * weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y, mean, rstd, variance


def _count(x: Tensor) -> Tensor:
    """Number of values per channel, as a tensor: runtimes cannot divide by symbolic integers."""
    return torch.scalar_tensor(x.shape[0], dtype=x.dtype) * math.prod(x.shape[2:])


def _per_channel(values_C: Tensor, x: Tensor) -> Tensor:
    return values_C.reshape([1, -1] + [1] * (x.dim() - 2))
