"""Gradients of convolutions."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from export.lowering.decompositions.windows import shifted, windows

aten = torch.ops.aten

_WIDE = 16
"""Input channels per group from which one product per kernel position is faster than im2col."""


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
    """Gradients of a 1-D or 2-D convolution, plain or transposed.

    The weight gradient is a batched matrix product for each kernel position. As a convolution
    with a kernel as large as the feature map it would take most of the step.
    """
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        if transposed:  # a transposed convolution is the adjoint of a convolution
            zeros = [0] * len(stride)
            grad_x = aten.convolution.default(
                grad_out, weight, None, stride, padding, dilation, False, zeros, groups
            )
        else:
            grad_x = _grad_input(grad_out, x, weight, stride, padding, dilation, groups)
    if output_mask[1]:
        y, seen = (x, grad_out) if transposed else (grad_out, x)
        grad_weight = _grad_weight(y, seen, weight, stride, padding, dilation, groups)
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
    depthwise = groups == c_in == c_out
    if depthwise or c_in // groups >= _WIDE:
        pairs = _aligned(grad_out, x, kernel, stride, padding, dilation)
        if depthwise:  # the product would be with matrices of one row
            all_but_channels = [0, *range(2, x.dim())]
            sums = [(g * seen).sum(all_but_channels) for g, seen in pairs]
            return torch.stack(sums, 1).reshape(weight.shape)
        products = []
        for g, seen in pairs:
            length = math.prod(g.shape[2:])
            g_gol = g.reshape(n * groups, c_out // groups, length)
            seen_gcl = seen.reshape(n * groups, c_in // groups, length)
            product = torch.bmm(g_gol, seen_gcl.transpose(1, 2))
            products.append(product.reshape(n, groups, c_out // groups, -1).sum(0))
        return torch.stack(products, -1).reshape(weight.shape)
    # few channels: one product with all positions side by side (im2col)
    length = math.prod(out)
    columns = [
        window.reshape(n, c_in, 1, length)
        for window in _seen(x, kernel, stride, padding, dilation, out)
    ]
    # (N, C_in, K, L), then grouped: (N * G, C_in / G * K, L)
    stacked = columns[0] if len(columns) == 1 else torch.cat(columns, 2)
    columns_gkl = stacked.reshape(n * groups, (c_in // groups) * math.prod(kernel), length)
    grad_gol = grad_out.reshape(n * groups, c_out // groups, length)
    product = torch.bmm(grad_gol, columns_gkl.transpose(1, 2))
    return product.reshape(n, groups, c_out // groups, -1).sum(0).reshape(weight.shape)


def _seen(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: list[int],
) -> list[Tensor]:
    """The input that each kernel position is multiplied with, for all outputs."""
    if any(padding):
        x = aten.constant_pad_nd.default(x, [p for side in reversed(padding) for p in (side, side)])
    # The last axis is cut first: then the other cuts, of which there are more, copy whole rows.
    seen = [x]
    for i in reversed(range(len(kernel))):
        cut = (windows(s, 2 + i, kernel[i], stride[i], dilation[i], out[i]) for s in seen)
        seen = [w for by_position in zip(*cut, strict=True) for w in by_position]
    return seen


def _aligned(
    grad_out: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[tuple[Tensor, Tensor]]:
    """For each kernel position, gradient and input shifted so that their products add up.

    A kernel of 3 x 3 would need nine shifted copies of the input. Here, the input is shifted along
    its last axis and the gradient along the other one, the other way: two copies of each, since one
    shift of three is none.
    """
    out, size = list(grad_out.shape[2:]), list(x.shape[2:])
    places = [
        [k * dilation[i] - padding[i] for k in range(kernel[i])] for i in range(len(kernel))
    ]  # input that the first output sees at each kernel position
    if not all(_overlap(*each) for each in zip(places, size, stride, out, strict=True)):
        seen = _seen(x, kernel, stride, padding, dilation, out)
        return [(grad_out, window) for window in seen]
    last = len(kernel) - 1
    inputs = [
        shifted(
            _every(x, 2 + last, stride[last], place), 2 + last, place // stride[last], out[last]
        )
        for place in places[last]
    ]
    if last == 0:
        return [(grad_out, seen) for seen in inputs]
    # rows are contiguous: without the last axis, a shift by rows is fewer, longer copies
    flat = grad_out.reshape(*grad_out.shape[:2], out[0] * out[1])
    pairs = []
    for place in places[0]:
        rows = [_every(seen, 2, stride[0], place) for seen in inputs]
        length = rows[0].shape[2] * out[1]
        moved = shifted(flat, 2, -(place // stride[0]) * out[1], length)
        aligned = moved.reshape(*moved.shape[:2], -1, out[1])
        pairs += [(aligned, seen) for seen in rows]
    return pairs


def _every(x: Tensor, dim: int, step: int, place: int) -> Tensor:
    """The entries along ``dim`` that are a multiple of ``step`` away from ``place``."""
    if step == 1:
        return x
    entries: Tensor = aten.slice.Tensor(x, dim, place % step, sys.maxsize, step)
    return entries


def _overlap(places: list[int], size: int | torch.SymInt, stride: int, outputs: int) -> bool:
    """Whether some output sees a part of the input at each kernel position.

    Not for a symbolic size, with which the number of outputs changes.
    """
    if not isinstance(size, int):
        return False
    return all(any(0 <= place + stride * o < size for o in range(outputs)) for place in places)
