"""Convolutions with computed weights, as matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from export.lowering.decompositions.windows import fold
from export.lowering.rewrites.rule import Declined
from export.lowering.rewrites.slices import cat, part, resize, spread, window


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """A 1-D or 2-D convolution as matrix products over shifted inputs, channels last.

    The shifted inputs of one kernel row are concatenated as channels and multiplied with the
    weights of that row in one product; the products of the rows are summed. This is im2col without
    its copies along the kernel's rows. A transposed convolution is a convolution over the input
    with zeros between its elements.
    """
    if any(not isinstance(n, int) for n in x.shape[2:]) or weight.dim() not in (3, 4):
        raise Declined
    if weight.dim() == 3:
        y = convolution(
            x.unsqueeze(2), weight.unsqueeze(2), bias, [1, *stride], [0, *padding],
            [1, *dilation], transposed, [0, *output_padding], groups,
        )  # fmt: skip
        return y.squeeze((2,))
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    x = x.permute(0, 2, 3, 1)
    if transposed and groups == weight.shape[0] and weight.shape[1] == 1:
        y = _transposed_depthwise(x, weight, stride, padding, dilation, output_padding)
        y = y if bias is None else y + bias
        return y.permute(0, 3, 1, 2)
    if transposed:
        for axis in (1, 2):
            x = spread(x, axis, stride[axis - 1])
        before = [r - p for r, p in zip(reach, padding, strict=True)]
        # spread adds surplus zeros behind the last element
        after = [
            b + extra - (s - 1) for b, extra, s in zip(before, output_padding, stride, strict=True)
        ]
        stride = [1, 1]
        weight = weight.flip((2, 3)).reshape(groups, -1, *weight.shape[1:])
        weight = weight.permute(0, 2, 1, 3, 4).reshape(-1, weight.shape[1], *weight.shape[3:])
    else:
        before = after = list(padding)
    for axis in (1, 2):
        x = resize(x, axis, before[axis - 1], after[axis - 1])
    if weight.shape[1] == 1 and groups > 1:
        y = _depthwise(x, weight, stride, dilation)
    elif groups > 1:
        c_in, c_out = weight.shape[1], weight.shape[0] // groups
        parts = [
            _dense(part(x, 3, g * c_in, c_in), part(weight, 0, g * c_out, c_out), stride, dilation)
            for g in range(groups)
        ]
        y = torch.cat(parts, 3)
    else:
        y = _dense(x, weight, stride, dilation)
    if bias is not None:
        y = y + bias
    return y.permute(0, 3, 1, 2)


def _dense(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """Convolution without groups of a padded input (N, H, W, C), to (N, H', W', C')."""
    c_out, c_in, rows, columns = weight.shape
    out = _out_size(x, weight, stride, dilation)
    shifted = [
        window(x, 2, j * dilation[1], out[1], stride[1]) for j in range(columns)
    ]  # each (N, H, OW, C)
    wide = cat(shifted, 3)
    by_row = weight.permute(0, 2, 3, 1).reshape(c_out, rows, columns * c_in)
    products = [
        linear(
            window(wide, 1, i * dilation[0], out[0], stride[0]),
            by_row[:, i : i + 1].reshape(c_out, columns * c_in),
        )
        for i in range(rows)
    ]
    return _sum(products)


def _depthwise(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """Depthwise convolution of a padded input (N, H, W, C) with weights (C * M, 1, KH, KW)."""
    channels, (rows, columns) = x.shape[3], weight.shape[2:]
    out = _out_size(x, weight, stride, dilation)
    # (KH * KW, M, C): M passes over the channels give the M outputs of each channel
    passes = weight.reshape(channels, -1, rows * columns).permute(2, 1, 0)
    shifted = [window(x, 2, j * dilation[1], out[1], stride[1]) for j in range(columns)]
    windows = [
        window(wide, 1, i * dilation[0], out[0], stride[0]) for i in range(rows) for wide in shifted
    ]
    results = [
        _sum([w * passes[k : k + 1, m : m + 1] for k, w in enumerate(windows)]).unsqueeze(4)
        for m in range(passes.shape[1])
    ]
    return cat(results, 4).reshape(x.shape[0], *out, -1)


def _transposed_depthwise(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
) -> Tensor:
    """Transposed depthwise convolution of (N, H, W, C) with weights (C, 1, KH, KW).

    The products of the kernel positions are added where they belong. There are no products with
    zeros between the elements of the input.
    """
    rows, columns = weight.shape[2:]
    full = [
        (x.shape[1 + i] - 1) * stride[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1
        for i in range(2)
    ]
    passes = weight.reshape(-1, rows * columns).permute(1, 0)
    products = [x * passes[k : k + 1] for k in range(rows * columns)]
    by_row = [
        fold(products[i : i + columns], 2, stride[1], dilation[1], full[1])
        for i in range(0, len(products), columns)
    ]
    y = fold(by_row, 1, stride[0], dilation[0], full[0])
    for axis in (1, 2):
        p = padding[axis - 1]
        y = resize(y, axis, -p, output_padding[axis - 1] - p)
    return y


def _out_size(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> list[int]:
    return [
        (x.shape[1 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
