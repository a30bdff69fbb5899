"""Backward operations written with forward operations, so that an inference runtime can run them.

Only what torch's core decompositions leave over is here. Each function is exact up to rounding;
``tests/test_decompositions.py`` compares them with eager autograd over random shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten


def convolution_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a 1-D or 2-D convolution.

    The weight gradient is im2col (one strided slice per kernel position) and a batched product:
    as a convolution with a kernel as large as the feature map it takes most of the step.
    """
    if transposed:
        raise NotImplementedError("backward of a transposed convolution")
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        grad_x = _grad_input(grad_out, x, weight, stride, padding, dilation, groups)
    if output_mask[1]:
        grad_weight = _grad_weight(grad_out, x, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        grad_bias = grad_out.sum([0, *range(2, grad_out.dim())])
    return grad_x, grad_weight, grad_bias


def _grad_input(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    spatial = range(weight.dim() - 2)
    reach = [dilation[i] * (weight.shape[2 + i] - 1) for i in spatial]
    zeros = [0] * len(spatial)
    if all(s == 1 for s in stride) and all(p <= r for p, r in zip(padding, reach, strict=True)):
        # a plain convolution with the flipped kernel is faster than a transposed one
        flipped = weight.flip([2 + i for i in spatial])
        out_per_group = weight.shape[0] // groups
        flipped = flipped.reshape(groups, out_per_group, *weight.shape[1:]).transpose(1, 2)
        flipped = flipped.reshape(x.shape[1], out_per_group, *weight.shape[2:])
        back = [r - p for r, p in zip(reach, padding, strict=True)]
        ones = [1] * len(spatial)
        plain: Tensor = aten.convolution.default(
            grad_out, flipped, None, ones, back, dilation, False, zeros, groups
        )
        return plain
    extra = [
        x.shape[2 + i] - ((grad_out.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach[i] + 1)
        for i in spatial
    ]
    transposed: Tensor = aten.convolution.default(
        grad_out, weight, None, stride, padding, dilation, True, extra, groups
    )
    return transposed


def _grad_weight(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    n, c_out, c_in = x.shape[0], weight.shape[0], x.shape[1]
    kernel, out = list(weight.shape[2:]), list(grad_out.shape[2:])
    length = math.prod(out)
    if any(padding):
        x = aten.constant_pad_nd.default(x, [p for side in reversed(padding) for p in (side, side)])
    columns = []
    for position in itertools.product(*(range(k) for k in kernel)):
        window = x
        for i, offset in enumerate(position):
            start = offset * dilation[i]
            window = aten.slice.Tensor(
                window, 2 + i, start, start + (out[i] - 1) * stride[i] + 1, stride[i]
            )
        columns.append(window.reshape(n, c_in, 1, length))
    # (N, C_in, K, L), then grouped: (N * G, C_in / G * K, L)
    stacked = columns[0] if len(columns) == 1 else torch.cat(columns, 2)
    columns_gkl = stacked.reshape(n * groups, (c_in // groups) * math.prod(kernel), length)
    grad_gol = grad_out.reshape(n * groups, c_out // groups, length)
    product = torch.bmm(grad_gol, columns_gkl.transpose(1, 2))
    return product.reshape(n, groups, c_out // groups, -1).sum(0).reshape(weight.shape)


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
    grouped = x.reshape(x.shape[0], group, -1)
    mean = grouped.mean(2, keepdim=True)
    centred = grouped - mean
    rstd = ((centred * centred).mean(2, keepdim=True) + eps).rsqrt()
    y = (centred * rstd).reshape(x.shape)
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    if weight is not None:
        y = y * weight.reshape(per_channel)
    if bias is not None:
        y = y + bias.reshape(per_channel)
    return y, mean.squeeze(2), rstd.squeeze(2)


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
    """Gradients of GroupNorm in about half the operations of torch's own decomposition."""
    rstd = rstd.unsqueeze(2)
    normalised = (x.reshape(x.shape[0], group, -1) - mean.unsqueeze(2)) * rstd
    all_but_channels = [0, *range(2, x.dim())]
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad_out
        if weight is not None:
            scaled = grad_out * weight.reshape([1, -1] + [1] * (x.dim() - 2))
        g = scaled.reshape(x.shape[0], group, -1)
        correction = normalised * (g * normalised).mean(2, keepdim=True)
        grad_x = (rstd * (g - g.mean(2, keepdim=True) - correction)).reshape(x.shape)
    if output_mask[1]:
        grad_weight = (grad_out * normalised.reshape(x.shape)).sum(all_but_channels)
    if output_mask[2]:
        grad_bias = grad_out.sum(all_but_channels)
    return grad_x, grad_weight, grad_bias


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table for tracing: torch's core decompositions with ours in place of some."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.native_group_norm.default] = native_group_norm
    table[aten.native_group_norm_backward.default] = native_group_norm_backward
    return table
