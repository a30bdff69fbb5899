"""Padding by reflection and replication, one dimension at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from export.lowering.decompositions.windows import crop, pad


def reflection_pad(x: Tensor, padding: list[int]) -> Tensor:
    """Pad the last one or two dimensions by reflection; ``padding`` is ordered as in torch."""
    for dim, before, after in _sides(x, padding):
        parts = [x]
        if before:
            parts.insert(0, crop(x, dim, 1, before).flip([dim]))
        if after:
            parts.append(crop(x, dim, x.shape[dim] - 1 - after, after).flip([dim]))
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x


def reflection_pad_backward(grad_out: Tensor, x: Tensor, padding: list[int]) -> Tensor:
    """Gradient of :func:`reflection_pad`: each entry gets the gradients of its reflections."""
    grad = grad_out
    for dim, before, after in _sides(x, padding):
        size = x.shape[dim]
        total = crop(grad, dim, before, size)
        if before:
            mirrored = crop(grad, dim, 0, before).flip([dim])
            total = total + pad(mirrored, dim, 1, size - 1 - before)
        if after:
            mirrored = crop(grad, dim, before + size, after).flip([dim])
            total = total + pad(mirrored, dim, size - 1 - after, 1)
        grad = total
    return grad


def replication_pad_backward(grad_out: Tensor, x: Tensor, padding: list[int]) -> Tensor:
    """Gradient of replication padding: each edge gets the gradients of its copies."""
    grad = grad_out
    for dim, before, after in _sides(x, padding):
        size = x.shape[dim]
        total = crop(grad, dim, before, size)
        if before:
            total = total + pad(crop(grad, dim, 0, before).sum(dim, keepdim=True), dim, 0, size - 1)
        if after:
            copies = crop(grad, dim, before + size, after)
            total = total + pad(copies.sum(dim, keepdim=True), dim, size - 1, 0)
        grad = total
    return grad


def _sides(x: Tensor, padding: list[int]) -> list[tuple[int, int, int]]:
    """Padded dimensions, each with the number of entries added before and after it."""
    return [(x.dim() - 1 - i, padding[2 * i], padding[2 * i + 1]) for i in range(len(padding) // 2)]
