"""Pooling over the last two dimensions, one after the other, and its gradients.

Forward operators for which runtimes have a kernel stay. torch traces pooling over one dimension as
pooling over two, one of which has size 1.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from export.lowering.decompositions.windows import crop, fold, pad, windows

aten = torch.ops.aten


def max_pool2d_with_indices_backward(
    grad_out: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Gradient of max pooling; the first of equal maxima in row-major order gets it, as in torch.

    The first maximum of a window lies in the first row that contains the maximum, and is the first
    in that row. So the gradient is traced back through the rows, then through the columns.
    """
    kernel, step = _pair(kernel_size), _pair(stride or kernel_size)
    border, spread = _pair(padding), _pair(dilation)

    def pool(values: Tensor, axis: int) -> Tensor:
        k, s, p, d = [1, 1], [1, 1], [0, 0], [1, 1]
        k[axis], s[axis], p[axis], d[axis] = kernel[axis], step[axis], border[axis], spread[axis]
        pooled: Tensor = aten.max_pool2d_with_indices.default(values, k, s, p, d, ceil_mode)[0]
        return pooled

    def trace_back(grad: Tensor, values: Tensor, maxima: Tensor, axis: int) -> Tensor:
        dim = values.dim() - 2 + axis
        k, s, p, d = kernel[axis], step[axis], border[axis], spread[axis]
        size, outputs = values.shape[dim], maxima.shape[dim]
        end = max(p + size, (outputs - 1) * s + (k - 1) * d + 1)
        padded = pad(values, dim, p, end - p - size, float("-inf"))
        zero = grad.new_zeros(())
        parts = []
        for window in windows(padded, dim, k, s, d, outputs)[:-1]:
            part = torch.where(window == maxima, grad, zero)
            grad = grad - part
            parts.append(part)
        return crop(fold([*parts, grad], dim, s, d, end), dim, p, size)

    row_maxima = pool(x, 1)
    grad_rows = trace_back(grad_out, row_maxima, pool(row_maxima, 0), 0)
    return trace_back(grad_rows, x, row_maxima, 1)


def avg_pool2d(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int] = (),  # type: ignore[assignment]
    padding: list[int] = (0,),  # type: ignore[assignment]
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average pooling with ``ceil_mode`` or a given divisor.

    Returns ``NotImplemented`` for other arguments, which keeps the operator: runtimes have a
    kernel for it.
    """
    if not ceil_mode and divisor_override is None:
        return NotImplemented
    kernel, step, border = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    outputs = []
    total = x
    for axis in (0, 1):
        dim, size = x.dim() - 2 + axis, x.shape[axis - 2]
        k, s, p = kernel[axis], step[axis], border[axis]
        count = _outputs(size, k, s, p, ceil_mode)
        outputs.append(count)
        end = max(p + size, (count - 1) * s + k)
        parts = windows(pad(total, dim, p, end - p - size), dim, k, s, 1, count)
        total = sum(parts[1:], parts[0])
    if divisor_override is not None:
        return total / divisor_override
    return total / _divisors(x, outputs, kernel, step, border, count_include_pad)


def avg_pool2d_backward(
    grad_out: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Gradient of average pooling: every entry of a window gets the same share."""
    kernel, step, border = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    if divisor_override is not None:
        grad = grad_out / divisor_override
    elif not any(border) and not ceil_mode:
        grad = grad_out / (kernel[0] * kernel[1])
    else:
        outputs = list(grad_out.shape[-2:])
        grad = grad_out / _divisors(x, outputs, kernel, step, border, count_include_pad)
    for axis in (0, 1):
        dim, size = x.dim() - 2 + axis, x.shape[axis - 2]
        k, s, p = kernel[axis], step[axis], border[axis]
        end = max(p + size, (grad.shape[dim] - 1) * s + k)
        grad = crop(fold([grad] * k, dim, s, 1, end), dim, p, size)
    return grad


def adaptive_avg_pool2d(x: Tensor, output_size: list[int]) -> Tensor:
    """Adaptive average pooling, as one matrix product per dimension if the sizes do not divide."""
    sizes = list(x.shape[-2:])
    if all(size % out == 0 for size, out in zip(sizes, output_size, strict=True)):
        kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
        pooled: Tensor = aten.avg_pool2d.default(x, kernel, kernel)
        return pooled
    rows, columns = (_shares(x, s, o) for s, o in zip(sizes, output_size, strict=True))
    return rows @ (x @ columns.t())


def adaptive_avg_pool2d_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """Gradient of adaptive average pooling."""
    sizes, outputs = list(x.shape[-2:]), list(grad_out.shape[-2:])
    if all(size % out == 0 for size, out in zip(sizes, outputs, strict=True)):
        kernel = [size // out for size, out in zip(sizes, outputs, strict=True)]
        return avg_pool2d_backward(grad_out, x, kernel, kernel, [0, 0], False, True, None)
    rows, columns = (_shares(x, s, o) for s, o in zip(sizes, outputs, strict=True))
    return rows.t() @ (grad_out @ columns)


def adaptive_max_pool2d(x: Tensor, output_size: list[int]) -> tuple[Tensor, Tensor]:
    """Adaptive max pooling; raises NotImplementedError if sizes do not divide the input's.

    To a single value, the input may have any size.
    """
    if all(n == 1 for n in output_size):
        value, place = x.flatten(-2).max(-1, keepdim=True)
        return value.unsqueeze(-1), place.unsqueeze(-1)
    kernel = _dividing(x, output_size)
    pooled: tuple[Tensor, Tensor] = aten.max_pool2d_with_indices.default(x, kernel, kernel)
    return pooled


def adaptive_max_pool2d_backward(grad_out: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Gradient of adaptive max pooling."""
    if all(n == 1 for n in grad_out.shape[-2:]):
        flat = aten.scatter_add.default(
            torch.zeros_like(x).flatten(-2), -1, indices.flatten(-2), grad_out.flatten(-2)
        )
        return cast(Tensor, flat).reshape(x.shape)
    kernel = _dividing(x, list(grad_out.shape[-2:]))
    return max_pool2d_with_indices_backward(
        grad_out, x, kernel, kernel, [0, 0], [1, 1], False, indices
    )


def _dividing(x: Tensor, outputs: list[int]) -> list[int]:
    sizes = list(x.shape[-2:])
    if any(size % out for size, out in zip(sizes, outputs, strict=True)):
        raise NotImplementedError(f"adaptive max pooling of {sizes} to {outputs}: must divide")
    return [size // out for size, out in zip(sizes, outputs, strict=True)]


def _pair(values: list[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


def _outputs(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Number of windows; a window that would start in the padding at the end does not count."""
    room = size + 2 * padding - kernel
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def _divisors(
    x: Tensor,
    outputs: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    count_include_pad: bool,
) -> Tensor:
    """Number of entries that each window averages, (H', W'); none lies beyond the padding."""
    counts = []
    for axis in (0, 1):
        size, p = x.shape[axis - 2], padding[axis]
        start = torch.arange(outputs[axis], device=x.device) * stride[axis] - p
        end = (start + kernel[axis]).clamp(max=size + p if count_include_pad else size)
        counts.append((end - (start if count_include_pad else start.clamp(min=0))).to(x.dtype))
    return counts[0].unsqueeze(1) * counts[1]


def _shares(x: Tensor, size: int, outputs: int) -> Tensor:
    """The matrix (outputs, size) of adaptive average pooling over one dimension.

    Output ``o`` averages the entries from floor(o * size / outputs) up to, but excluding,
    ceil((o + 1) * size / outputs).
    """
    o = torch.arange(outputs, device=x.device).unsqueeze(1)
    i = torch.arange(size, device=x.device)
    inside = ((o * size < (i + 1) * outputs) & (i * outputs < (o + 1) * size)).to(x.dtype)
    return inside / inside.sum(1, keepdim=True)
