"""Backward operations written as forward operations equal eager autograd, over random shapes."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.export import Dim, default_decompositions
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.nn.functional import batch_norm, conv1d, conv2d, group_norm, pad

from export.lowering import decompositions
from export.lowering.decompositions import indexing, norms, padding, pooling
from export.torch_internals import SymbolicSizes, trace_graph


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
        """Return whether the output has at least one position."""
        dimensions = zip(self.size, self.kernel, self.padding, self.dilation, strict=True)
        return all(n + 2 * p >= d * (k - 1) + 1 for n, k, p, d in dimensions)


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    """1-D and 2-D convolutions; every dimension has its own stride, padding and dilation."""
    dims = draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    conv = Conv(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        in_per_group=draw(st.sampled_from([1, 2, 3, 17])),  # few, or a product for each position
        out_per_group=draw(st.integers(1, 3)),
        size=each(1, 7),
        kernel=each(1, 3),
        stride=each(1, 3),
        padding=each(0, 5),  # also beyond dilation * (kernel - 1)
        dilation=each(1, 2),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    assume(conv.fits)
    return conv


def one(batch: int, groups: int, channels: int, dims: int, bias: bool = True, **each: int) -> Conv:
    """Return a convolution with the same numbers in every dimension."""
    values = {"size": 6, "kernel": 3, "stride": 1, "padding": 1, "dilation": 1} | each
    spatial = {name: (n,) * dims for name, n in values.items()}
    return Conv(batch, groups, channels, channels, bias=bias, seed=0, **spatial)  # type: ignore[arg-type]


def assert_close(got: Tensor | None, want: Tensor, what: str) -> None:
    """Check that tensors have one shape and are equal up to float64 rounding."""
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
@example(one(2, 1, 17, dims=2))
@example(one(1, 1, 17, dims=2, size=1, dilation=2, padding=2))  # positions that see padding only
@example(one(2, 5, 1, dims=2, size=7, stride=2, padding=0))
def test_convolution_backward(conv: Conv) -> None:
    """All three gradients equal those of autograd through the eager convolution."""
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
    """The output mask selects the gradients to compute: the first layer needs none of x."""
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


group_norms = st.builds(
    Norm,
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    size=st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple),
    affine=st.booleans(),
    seed=st.integers(0, 2**31),
).filter(lambda norm: norm.batch * norm.per_group * torch.Size(norm.size).numel() > 1)


@settings(max_examples=150, deadline=None)
@given(group_norms)
@example(Norm(1, 1, 3, (4, 4), True, 0))
@example(Norm(2, 3, 1, (5,), False, 0))
def test_group_norm_and_its_backward(norm: Norm) -> None:
    """Output and gradients equal those of eager GroupNorm, with and without affine parameters."""
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
    fused = norms.group_norm_by_layer_norm(plain_x, plain_weight, plain_bias, *sizes, eps)
    for mine, want in zip(fused, (y.detach(), mean, rstd), strict=True):
        assert_close(mine, want, "by LayerNorm")
    got = decompositions.native_group_norm_backward(
        grad_y, plain_x, mean, rstd, plain_weight, *sizes, [True, norm.affine, norm.affine]
    )
    # In a group of nearly equal values the gradient is a difference of large numbers.
    scale = 1e-10 * (1 + rstd.max().item() * grad_y.abs().max().item())
    for name, mine, want in zip(("x", "weight", "bias"), got, wanted, strict=False):
        assert mine is not None
        error = (mine - want).abs().max().item()
        assert error <= scale, f"gradient of {name} is off by {error}"
    if not norm.affine:
        assert got[1:] == (None, None)


def test_table_keeps_torchs_core_decompositions() -> None:
    """The table lacks only ``squeeze.dim`` of torch's table, and replaces some entries."""
    table = decompositions.decompositions()
    aten = torch.ops.aten
    missing = set(default_decompositions()) - set(table)  # other packages register theirs later
    assert {op for op in missing if op.namespace == "aten"} == {aten.squeeze.dim}
    assert table[aten.convolution_backward.default] is decompositions.convolution_backward
    assert table[aten.native_group_norm.default] is decompositions.native_group_norm


def random_tensor(seed: int, *shape: int, ties: bool = False) -> Tensor:
    """Return random float64 values; with ``ties``, only a few different ones."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.round() if ties else values


def gradient(y: Tensor, inputs: list[Tensor], seed: int) -> tuple[Tensor, list[Tensor]]:
    """Return a random gradient of ``y``, and the gradients of the inputs by autograd."""
    grad_y = random_tensor(seed + 1, *y.shape)
    return grad_y, list(torch.autograd.grad(y, inputs, grad_y))


@dataclass(frozen=True)
class Pool:
    """A pooling and the size of its input; one entry per dimension."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool
    seed: int


@st.composite
def pools(draw: st.DrawFn, dilated: bool) -> Pool:
    """Windows that overlap, leave gaps or overhang, with padding of up to half a kernel."""

    def each(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = each(1, 4)
    pool = Pool(
        size=each(1, 9),
        kernel=kernel,
        stride=each(1, 4),
        padding=(draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))),
        dilation=each(1, 2) if dilated else (1, 1),
        ceil_mode=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    reach = (d * (k - 1) + 1 for k, d in zip(pool.kernel, pool.dilation, strict=True))
    assume(all(n + 2 * p >= r for n, p, r in zip(pool.size, pool.padding, reach, strict=True)))
    return pool


@settings(max_examples=300, deadline=None)
@given(pools(dilated=True))
@example(Pool((6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False, 0))
@example(Pool((7, 7), (3, 3), (2, 2), (1, 1), (1, 1), False, 0))
@example(Pool((8, 7), (3, 3), (2, 2), (1, 1), (1, 1), True, 0))
def test_max_pool_backward(pool: Pool) -> None:
    """The gradient of every window goes to its first maximum, also if several are equal."""
    x = random_tensor(pool.seed, 2, 2, *pool.size, ties=True).requires_grad_()
    settings = [list(v) for v in (pool.kernel, pool.stride, pool.padding, pool.dilation)]
    y, indices = torch.ops.aten.max_pool2d_with_indices(x, *settings, pool.ceil_mode)
    assume(y.isfinite().all())  # if a window has only padding, torch crashes
    grad_y, (want,) = gradient(y, [x], pool.seed)
    got = pooling.max_pool2d_with_indices_backward(
        grad_y, x.detach(), *settings, pool.ceil_mode, indices
    )
    assert_close(got, want, "gradient of x")


@settings(max_examples=300, deadline=None)
@given(pools(dilated=False), st.booleans(), st.sampled_from([None, 3]))
@example(Pool((6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False, 0), True, None)
@example(Pool((8, 7), (3, 3), (2, 2), (1, 1), (1, 1), True, 0), False, None)
def test_avg_pool_and_its_backward(pool: Pool, include_pad: bool, divisor: int | None) -> None:
    """The divisor of windows at the edge is torch's."""
    x = random_tensor(pool.seed, 2, 2, *pool.size).requires_grad_()
    settings = [list(v) for v in (pool.kernel, pool.stride, pool.padding)]
    y = torch.ops.aten.avg_pool2d(x, *settings, pool.ceil_mode, include_pad, divisor)
    grad_y, (want,) = gradient(y, [x], pool.seed)
    rest = (*settings, pool.ceil_mode, include_pad, divisor)
    got_y = pooling.avg_pool2d(x.detach(), *rest)
    if got_y is not NotImplemented:
        assert_close(got_y, y.detach(), "output")
    assert_close(pooling.avg_pool2d_backward(grad_y, x.detach(), *rest), want, "gradient of x")


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 8)] * 4, st.integers(0, 2**31))
@example(8, 8, 2, 4, 0)
def test_adaptive_pools(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    """The output size divides the input size or not, and may be larger."""
    x = random_tensor(seed, 2, 2, height, width, ties=True).requires_grad_()
    y = torch.ops.aten._adaptive_avg_pool2d(x, [rows, columns])
    grad_y, (want,) = gradient(y, [x], seed)
    assert_close(pooling.adaptive_avg_pool2d(x.detach(), [rows, columns]), y.detach(), "output")
    got = pooling.adaptive_avg_pool2d_backward(grad_y, x.detach())
    assert_close(got, want, "gradient of x")

    y, indices = torch.ops.aten.adaptive_max_pool2d(x, [rows, columns])
    grad_y, (want,) = gradient(y, [x], seed)
    if height % rows or width % columns:
        with pytest.raises(NotImplementedError, match="must divide"):
            pooling.adaptive_max_pool2d(x.detach(), [rows, columns])
        return
    got_y, got_indices = pooling.adaptive_max_pool2d(x.detach(), [rows, columns])
    assert torch.equal(got_y, y)
    assert torch.equal(got_indices, indices)
    got = pooling.adaptive_max_pool2d_backward(grad_y, x.detach(), indices)
    assert_close(got, want, "gradient of x")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_batch_norm_and_its_backward(
    size: list[int], affine: bool, training: bool, seed: int
) -> None:
    """Output, running statistics and all gradients are equal, in training and in evaluation."""
    x = (3 + 2 * random_tensor(seed, 3, 4, *size)).requires_grad_()
    weight, bias, mean = (random_tensor(seed + i, 4).requires_grad_(i < 3) for i in (1, 2, 3))
    var = random_tensor(seed + 4, 4).exp()
    mine = (mean.clone(), var.clone())
    inputs = [x, weight, bias] if affine else [x]
    plain = [t.detach() if affine else None for t in (weight, bias)]
    y = batch_norm(
        x, mean, var, weight if affine else None, bias if affine else None, training, 0.3, 1e-5
    )
    grad_y, wanted = gradient(y, inputs, seed)
    got_y, save_mean, save_rstd = norms.batch_norm(x.detach(), *plain, *mine, training, 0.3, 1e-5)
    assert_close(got_y, y.detach(), "output")
    assert_close(mine[0], mean, "running mean")
    assert_close(mine[1], var, "running variance")
    got = norms.native_batch_norm_backward(
        grad_y,
        x.detach(),
        plain[0],
        *mine,
        save_mean,
        save_rstd,
        training,
        1e-5,
        [True, affine, affine],
    )
    scale = 1e-10 * (1 + (save_rstd.max().item() if training else 1) * grad_y.abs().max().item())
    for name, one_got, want in zip(("x", "weight", "bias"), got, wanted, strict=False):
        assert one_got is not None
        assert (one_got - want).abs().max().item() <= scale, f"gradient of {name}"
    assert [g is not None for g in got] == [True, affine, affine]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.lists(st.integers(2, 5), min_size=1, max_size=2),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_layer_norm_backward(outer: list[int], inner: list[int], affine: bool, seed: int) -> None:
    """All gradients equal those of eager LayerNorm, over one dimension and over two."""
    x = random_tensor(seed, *outer, *inner).requires_grad_()
    weight, bias = (random_tensor(seed + i, *inner).requires_grad_() for i in (1, 2))
    affines = (weight, bias) if affine else (None, None)
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, inner, *affines, 1e-5)
    grad_y, wanted = gradient(y, [x, weight, bias] if affine else [x], seed)
    got = norms.native_layer_norm_backward(
        grad_y, x, inner, mean, rstd, *affines, [True, affine, affine]
    )
    scale = 1e-10 * (1 + rstd.max().item() ** 2 * grad_y.abs().max().item())
    for name, mine, want in zip(("x", "weight", "bias"), got, wanted, strict=False):
        assert mine is not None
        assert (mine - want).abs().max().item() <= scale, f"gradient of {name}"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.booleans(), st.integers(0, 2**31))
def test_pads(widths: list[int], flat: bool, seed: int) -> None:
    """Reflection and replication are exact over one dimension and over two."""
    dims = 1 if flat else 2
    given_widths = widths[: 2 * dims]
    x = random_tensor(seed, 2, 3, *[4, 5][:dims]).requires_grad_()
    y = pad(x, given_widths, mode="reflect")
    grad_y, (want,) = gradient(y, [x], seed)
    assert_close(padding.reflection_pad(x.detach(), given_widths), y.detach(), "output")
    got = padding.reflection_pad_backward(grad_y, x.detach(), given_widths)
    assert_close(got, want, "gradient through reflection")
    y = pad(x, given_widths, mode="replicate")
    grad_y, (want,) = gradient(y, [x], seed)
    got = padding.replication_pad_backward(grad_y, x.detach(), given_widths)
    assert_close(got, want, "gradient through replication")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2), st.integers(-6, 6), st.integers(-6, 7), st.integers(1, 4), st.integers(0, 9)
)
def test_views(dim: int, start: int, end: int, step: int, seed: int) -> None:
    """The gradients of slices, single entries and sliding windows are exact."""
    x = random_tensor(seed, 7, 8, 9).requires_grad_()
    shape = list(x.shape)
    y = torch.ops.aten.slice(x, dim, start, end, step)
    if y.numel():
        grad_y, (want,) = gradient(y, [x], seed)
        got = indexing.slice_backward(grad_y, shape, dim, start, end, step)
        assert_close(got, want, "gradient through a slice")
    grad_y, (want,) = gradient(x.select(dim, start), [x], seed)
    got = indexing.select_backward(grad_y, shape, dim, start)
    assert_close(got, want, "gradient through an entry")
    window = abs(end) or 1
    grad_y, (want,) = gradient(x.unfold(dim, window, step), [x], seed)
    got = indexing.unfold_backward(grad_y, shape, dim, window, step)
    assert_close(got, want, "gradient through windows")


@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_embedding_backward(padding_idx: int) -> None:
    """A row that is looked up several times gets the sum; the padding row gets no gradient."""
    indices = torch.tensor([[1, 2, 1], [4, 2, 0]])
    grad_y = random_tensor(0, 2, 3, 5)
    want = torch.ops.aten.embedding_dense_backward(grad_y, indices, 6, padding_idx, False)
    got = indexing.embedding_dense_backward(grad_y, indices, 6, padding_idx, False)
    assert_close(got, want, "gradient of the table")
    with pytest.raises(NotImplementedError, match="frequency"):
        indexing.embedding_dense_backward(grad_y, indices, 6, padding_idx, True)


class Part(nn.Module):
    """A function, or the first output of a module, as a module with one tensor."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor."""
        y = self.inner(x)
        return y[0] if isinstance(y, tuple) else y


def training(module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function ``(x, parameters, buffers) -> output, gradients, new buffers``."""
    parameters, buffers = list(dict(module.named_parameters())), list(dict(module.named_buffers()))

    def function(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        values = iter(state)
        weights = {n: next(values).detach().requires_grad_() for n in parameters}
        statistics = {n: next(values).clone() for n in buffers}
        wanted = list(weights.values())
        if x.is_floating_point():
            x = x.detach().requires_grad_()
            wanted.append(x)
        y = functional_call(module, {**weights, **statistics}, (x,))
        return y.detach(), *torch.autograd.grad(y.sin().sum(), wanted), *statistics.values()

    return function


def traced(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> GraphModule:
    """Trace a training function as the exporter does: symbolic batch, no in-place operations."""
    symbolic = SymbolicSizes({"batch": 7})
    state = [*module.parameters(), *module.buffers()]
    table = decompositions.decompositions()
    with symbolic.tracing():
        example = torch.zeros(symbolic.sizes["batch"], *shape, dtype=dtype)
        arguments = [example, *(torch.zeros(t.shape, dtype=t.dtype) for t in state)]
        graph = trace_graph(training(module), arguments, table)
        graph = trace_graph(functionalize(graph, remove="mutations"), arguments, table)
    assert not symbolic.fixed(), "the batch got fixed"
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


FORBIDDEN = re.compile(r"_backward|batch_norm|_(scatter|strided)|index_put|\w_\.")
"""Operators that runtimes lack. In-place operators are not allowed either."""

IMAGES, SEQUENCE, ROW = (4, 8, 7), (3, 4), (6,)

MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "BatchNorm2d": (nn.BatchNorm2d(4, momentum=0.3), IMAGES),
    "BatchNorm1d": (nn.BatchNorm1d(6), ROW),
    "BatchNorm2d evaluated": (nn.BatchNorm2d(4).eval(), IMAGES),
    "BatchNorm2d without statistics": (nn.BatchNorm2d(4, track_running_stats=False), IMAGES),
    "InstanceNorm2d": (nn.InstanceNorm2d(4, affine=True), IMAGES),
    "GroupNorm": (nn.GroupNorm(2, 4), IMAGES),
    "LayerNorm": (nn.LayerNorm(4), SEQUENCE),
    "RMSNorm": (nn.RMSNorm(4), SEQUENCE),
    "MaxPool2d": (nn.MaxPool2d(3, 2, 1), IMAGES),
    "MaxPool1d": (nn.MaxPool1d(2, ceil_mode=True), (3, 7)),
    "AvgPool2d": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGES),
    "AvgPool1d": (nn.AvgPool1d(2), (3, 7)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((3, 7)), IMAGES),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(2), (3, 8)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d((2, 1)), IMAGES),
    "Hardswish": (nn.Hardswish(), ROW),
    "SiLU": (nn.SiLU(), ROW),
    "GELU": (nn.GELU(), ROW),
    "GELU tanh": (nn.GELU("tanh"), ROW),
    "ReLU6": (nn.ReLU6(), ROW),
    "Tanh, Sigmoid": (nn.Sequential(nn.Tanh(), nn.Sigmoid()), ROW),
    "Softmax, LogSoftmax": (nn.Sequential(nn.Softmax(-1), nn.LogSoftmax(-1)), ROW),
    "LSTM": (Part(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), SEQUENCE),
    "GRU": (Part(nn.GRU(4, 3, 2, batch_first=True, bias=False)), SEQUENCE),
    "LSTM, time first": (
        Part(nn.Sequential(Part(lambda x: x.transpose(0, 1)), nn.LSTM(4, 3))),
        SEQUENCE,
    ),
    "Embedding": (nn.Embedding(9, 5, padding_idx=0), (3,)),
    "Conv2d same": (nn.Conv2d(4, 8, (2, 4), padding="same", groups=4), IMAGES),
    "Conv2d depthwise": (nn.Conv2d(4, 4, 3, 2, 1, groups=4), IMAGES),
    "Conv2d circular": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), IMAGES),
    "Conv2d reflect": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), IMAGES),
    "Conv1d replicate": (nn.Conv1d(3, 2, 3, padding=2, padding_mode="replicate"), (3, 7)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), IMAGES),
    "views": (Part(lambda x: x[:, 1:, ::2] * x.roll(1, 1)[:, :-1, 0:1] + x[:, 0:1, 1:2]), (4, 8)),
    "unfold": (Part(lambda x: x.unfold(1, 3, 2)), (8, 3)),
}


def seeded(tensors: list[Tensor]) -> list[Tensor]:
    """Return positive values of the same shapes and dtypes, because variances must be positive."""
    return [
        (random_tensor(i, *t.shape).abs() + 0.1).to(t.dtype) if t.is_floating_point() else t
        for i, t in enumerate(tensors)
    ]


@pytest.mark.parametrize("name", MODULES)
def test_training_step_of(name: str) -> None:
    """Traced with a symbolic batch, a module trains as in eager mode, by forward operators."""
    module, shape = MODULES[name]
    module = copy.deepcopy(module).double()
    dtype = torch.int64 if isinstance(module, nn.Embedding) else torch.float64
    graph = traced(module, shape, dtype)
    operators = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    copies = {"aten.slice_scatter.default", "aten.new_empty_strided.default"}
    allowed = copies if name == "Conv2d circular" else set()
    assert not {o for o in operators if FORBIDDEN.search(o)} - allowed
    state = seeded([*module.parameters(), *module.buffers()])
    for batch in (2, 5):
        x = random_tensor(batch, batch, *shape)
        x = x if dtype == torch.float64 else x.abs().to(dtype)
        for got, want in zip(graph(x, *state), training(module)(x, *state), strict=True):
            assert_close(got, want, name)


@pytest.mark.parametrize(
    "name",
    [
        *("BatchNorm2d", "MaxPool2d", "AdaptiveAvgPool2d", "Embedding"),
        pytest.param("GRU", marks=pytest.mark.slow),
    ],
)
def test_onnx_of(name: str) -> None:
    """ONNX Runtime gives the same results in float32."""
    module, shape = MODULES[name]
    module = copy.deepcopy(module)
    dtype = torch.int64 if isinstance(module, nn.Embedding) else torch.float32
    graph = traced(module, shape, dtype)
    state = [
        t.float() if t.is_floating_point() else t
        for t in seeded([*module.parameters(), *module.buffers()])
    ]
    example = (torch.zeros(7, *shape, dtype=dtype), *state)
    dynamic = ({0: Dim("batch", min=2, max=64)}, *[None] * len(state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, example, dynamic_shapes=dynamic)
        exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    session = InferenceSession(exported.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    for batch in (2, 5):
        x = random_tensor(batch, batch, *shape).abs().to(dtype)
        feed = {n: t.numpy() for n, t in zip(names, (x, *state), strict=True)}
        for got, want in zip(session.run(None, feed), training(module)(x, *state), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)
