"""Backward operations written with forward operations equal eager autograd, over random shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, group_norm

from export.lowering import decompositions


@dataclass(frozen=True)
class Conv:
    """The shape of a convolution and of its input; one entry per spatial dimension."""

    batch: int
    groups: int
    in_per_group: int
    out_per_group: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool
    seed: int

    @property
    def fits(self) -> bool:
        """Whether the output has at least one position."""
        dimensions = zip(self.size, self.kernel, self.padding, self.dilation, strict=True)
        return all(n + 2 * p >= d * (k - 1) + 1 for n, k, p, d in dimensions)


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    """1-D and 2-D; every dimension has a stride, padding and dilation of its own."""
    dims = draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    conv = Conv(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        in_per_group=draw(st.integers(1, 3)),
        out_per_group=draw(st.integers(1, 3)),
        size=each(1, 7),
        kernel=each(1, 3),
        stride=each(1, 3),
        padding=each(0, 5),  # beyond dilation * (kernel - 1) as well
        dilation=each(1, 2),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    assume(conv.fits)
    return conv


def one(batch: int, groups: int, channels: int, dims: int, bias: bool = True, **each: int) -> Conv:
    """A convolution with the same numbers in every dimension."""
    values = {"size": 6, "kernel": 3, "stride": 1, "padding": 1, "dilation": 1} | each
    spatial = {name: (n,) * dims for name, n in values.items()}
    return Conv(batch, groups, channels, channels, bias=bias, seed=0, **spatial)  # type: ignore[arg-type]


def assert_close(got: Tensor | None, want: Tensor, what: str) -> None:
    """Equal up to float64 rounding, and of the same shape."""
    assert got is not None, f"{what} is missing"
    assert got.shape == want.shape, what
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert error <= 1e-12 * (1 + want.abs().max().item()), f"{what} is off by {error}"


@settings(max_examples=500, deadline=None)
@given(convs())
@example(one(1, 1, 3, dims=2))
@example(one(1, 5, 1, dims=2))  # depthwise
@example(one(2, 5, 1, dims=1, stride=2))
@example(one(2, 1, 2, dims=2, bias=False, kernel=1, padding=0))
@example(one(2, 1, 2, dims=2, kernel=1, padding=2))  # padding beyond the kernel's reach, stride 1
@example(one(1, 2, 2, dims=1, kernel=2, padding=4, dilation=2))
@example(one(2, 1, 2, dims=2, size=7, kernel=2, stride=3))  # the last columns are never read
def test_convolution_backward(conv: Conv) -> None:
    """All three gradients equal those that autograd finds through the eager convolution."""
    generator = torch.Generator().manual_seed(conv.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = random(conv.batch, conv.groups * conv.in_per_group, *conv.size).requires_grad_()
    weight = random(conv.groups * conv.out_per_group, conv.in_per_group, *conv.kernel)
    weight.requires_grad_()
    bias = random(len(weight)).requires_grad_() if conv.bias else None
    eager = conv2d if len(conv.size) == 2 else conv1d
    y = eager(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    grad_y = random(*y.shape)
    wanted = torch.autograd.grad(y, [x, weight] if bias is None else [x, weight, bias], grad_y)
    got = decompositions.convolution_backward(
        grad_y,
        x.detach(),
        weight.detach(),
        None if bias is None else list(bias.shape),
        list(conv.stride),
        list(conv.padding),
        list(conv.dilation),
        False,
        [0] * len(conv.size),
        conv.groups,
        [True, True, conv.bias],
    )
    for name, mine, want in zip(("x", "weight", "bias"), got, wanted, strict=False):
        assert_close(mine, want, f"gradient of {name}")
    if bias is None:
        assert got[2] is None


def test_only_what_is_asked_for() -> None:
    """The output mask decides which gradients are computed: the first layer needs none of x."""
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    grad_y = torch.randn(2, 4, 5, 5)
    for mask in ([False, True, True], [True, False, False], [False, False, True]):
        got = decompositions.convolution_backward(
            grad_y, x, weight, [4], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )
        assert [g is not None for g in got] == mask


@dataclass(frozen=True)
class Norm:
    """A GroupNorm and its input."""

    batch: int
    groups: int
    per_group: int
    size: tuple[int, ...]
    affine: bool
    seed: int


norms = st.builds(
    Norm,
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    size=st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple),
    affine=st.booleans(),
    seed=st.integers(0, 2**31),
).filter(lambda norm: norm.batch * norm.per_group * torch.Size(norm.size).numel() > 1)


@settings(max_examples=150, deadline=None)
@given(norms)
@example(Norm(1, 1, 3, (4, 4), True, 0))
@example(Norm(2, 3, 1, (5,), False, 0))
def test_group_norm_and_its_backward(norm: Norm) -> None:
    """Output and all gradients equal eager GroupNorm's, with and without affine parameters."""
    generator = torch.Generator().manual_seed(norm.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, eps = norm.groups * norm.per_group, 1e-5
    x = (3 + 2 * random(norm.batch, channels, *norm.size)).requires_grad_()
    weight = random(channels).requires_grad_() if norm.affine else None
    bias = random(channels).requires_grad_() if norm.affine else None
    y = group_norm(x, norm.groups, weight, bias, eps)
    grad_y = random(*y.shape)
    inputs = [t for t in (x, weight, bias) if t is not None]
    wanted = torch.autograd.grad(y, inputs, grad_y)

    plain_x = x.detach()
    plain_weight = None if weight is None else weight.detach()
    plain_bias = None if bias is None else bias.detach()
    sizes = (norm.batch, channels, plain_x[0, 0].numel(), norm.groups)
    got_y, mean, rstd = decompositions.native_group_norm(
        plain_x, plain_weight, plain_bias, *sizes, eps
    )
    assert_close(got_y, y.detach(), "output")
    assert mean.shape == rstd.shape == (norm.batch, norm.groups)
    got = decompositions.native_group_norm_backward(
        grad_y, plain_x, mean, rstd, plain_weight, *sizes, [True, norm.affine, norm.affine]
    )
    # a group of values that are all alike has a gradient that is a difference of large numbers
    scale = 1e-10 * (1 + rstd.max().item() * grad_y.abs().max().item())
    for name, mine, want in zip(("x", "weight", "bias"), got, wanted, strict=False):
        assert mine is not None
        error = (mine - want).abs().max().item()
        assert error <= scale, f"gradient of {name} is off by {error}"
    if not norm.affine:
        assert got[1:] == (None, None)


def test_table_keeps_torchs_core_decompositions() -> None:
    """What is replaced is replaced, and nothing of torch's table is lost."""
    from torch._decomp import core_aten_decompositions

    table = decompositions.decompositions()
    assert set(core_aten_decompositions()) <= set(table)
    aten = torch.ops.aten
    assert table[aten.convolution_backward.default] is decompositions.convolution_backward
    assert table[aten.native_group_norm.default] is decompositions.native_group_norm
