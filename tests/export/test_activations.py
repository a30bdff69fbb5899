"""Activations and their gradients as few operators equal those of eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, hardtanh, relu, silu, threshold

from export.lowering.decompositions import activations

SEEDS = st.integers(0, 2**31)


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Return float64 values, some of them whole numbers, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    x[:2] = x[:2].round()  # at the kinks
    return x, torch.randn(5, 7, generator=generator, dtype=torch.float64)


def wanted(eager: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> Tensor:
    """Return the gradient by autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(eager(x), x, grad_y)[0]


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from([-1.0, 0.0, 0.5, 2.0]))
def test_threshold(seed: int, bound: float) -> None:
    """A threshold passes gradients above it; ReLU does so by its input and by its output."""
    x, grad_y = inputs(seed)
    got = activations.threshold_backward(grad_y, x, bound)
    assert torch.equal(got, wanted(lambda x: threshold(x, bound, 0.0), x, grad_y))
    for seen in (x, relu(x)):
        got = activations.threshold_backward(grad_y, seen, 0)
        assert torch.equal(got, wanted(relu, x, grad_y))


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(-3, 0), st.integers(1, 6))
def test_hardtanh(seed: int, low: int, high: int) -> None:
    """A clamp passes gradients between its bounds, and none at them."""
    x, grad_y = inputs(seed)
    got = activations.hardtanh_backward(grad_y, x, low, high)
    assert torch.equal(got, wanted(lambda x: hardtanh(x, low, high), x, grad_y))


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_silu_and_gelu(seed: int) -> None:
    """Outputs and gradients equal eager ones up to rounding."""
    x, grad_y = inputs(seed)
    torch.testing.assert_close(activations.silu(x), silu(x), rtol=1e-12, atol=1e-12)
    got = activations.silu_backward(grad_y, x)
    torch.testing.assert_close(got, wanted(silu, x, grad_y), rtol=1e-12, atol=1e-12)
    for kind in ("none", "tanh"):

        def eager(x: Tensor, kind: str = kind) -> Tensor:
            return gelu(x, approximate=kind)

        y = activations.gelu(x, approximate=kind)
        torch.testing.assert_close(y, eager(x), rtol=1e-12, atol=1e-12)
        got = activations.gelu_backward(grad_y, x, approximate=kind)
        torch.testing.assert_close(got, wanted(eager, x, grad_y), rtol=1e-12, atol=1e-12)
