"""Activations and their gradients, with few passes over the activations.

ONNX Runtime takes 20 times as long for ``where`` as for a product, so gradients are multiplied with
a mask of 0 and 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

aten = torch.ops.aten


def threshold_backward(grad_out: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Gradient of ReLU, from its input or its output."""
    return grad_out * (x > threshold).to(grad_out.dtype)


def hardtanh_backward(grad_out: Tensor, x: Tensor, min_val: float, max_val: float) -> Tensor:
    """Gradient of a clamp such as ReLU6; zero at its bounds."""
    inside = torch.logical_and(x > min_val, x < max_val)
    return grad_out * inside.to(grad_out.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU by the sigmoid, which the gradient needs as well."""
    return x * x.sigmoid()


def silu_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """Gradient of SiLU: with ``y = x s``, the derivative is ``s (1 - y) + y``."""
    s = x.sigmoid()
    y = x * s
    return grad_out * (s * (1 - y) + y)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU, or its approximation with tanh, by a share of ``x`` that the gradient needs as well."""
    return x * (_share(x) if approximate == "none" else _approximate_share(x))


def gelu_backward(grad_out: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gradient of GELU or of its approximation."""
    if approximate == "none":
        share = _share(x)
        slope = (x * x * -0.5).exp() * x * (1 / math.sqrt(2 * math.pi))
        return grad_out * (share + slope)
    share = _approximate_share(x)
    # the approximation is x s(2 u), for the sigmoid s and u = c x + c d x^3
    slope = x * x * (6 * _C * _D) + 2 * _C
    return grad_out * (share + share * (1 - share) * x * slope)


_C, _D = math.sqrt(2 / math.pi), 0.044715


def _share(x: Tensor) -> Tensor:
    """The probability that a normal variable is below ``x``."""
    return (x * math.sqrt(0.5)).erf() * 0.5 + 0.5


def _approximate_share(x: Tensor) -> Tensor:
    """Its approximation, a sigmoid of ``2 c (x + d x^3)``."""
    return (x * (x * x * (2 * _C * _D) + 2 * _C)).sigmoid()
