"""Traced graphs with fewer passes over memory compute what they did before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from transformers.activations import NewGELUActivation

from export.lowering.fusions import fuse
from export.lowering.simplify import simplify
from export.lowering.trace import one_gelu
from export.torch_internals import SymbolicSizes, trace_graph

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default


def random(seed: int, *shape: int) -> Tensor:
    """Return random numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def traced(function: Callable[..., Tensor], *shapes: tuple[int | str, ...]) -> GraphModule:
    """Trace a function of tensors whose batch is a symbol."""
    symbolic = SymbolicSizes({"batch": 7})
    with symbolic.tracing():
        tensors = [torch.zeros([symbolic.sizes.get(n, n) for n in shape]) for shape in shapes]  # type: ignore[call-overload]
        return trace_graph(function, tensors)


def count(graph: GraphModule, target: Any) -> int:
    """Return how often an operator occurs."""
    return sum(node.target is target for node in graph.graph.nodes)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 5), min_size=2, max_size=3),
    st.integers(1, 2),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_scale_and_shift(
    sizes: list[int], channels: int, by_row: bool, batch: int, seed: int
) -> None:
    """A scale and a shift per channel, or per row and channel, are one batch norm."""
    leading = sizes[: min(channels, len(sizes) - 1)]
    numbers = ("batch" if by_row else 1, *leading, *[1] * (len(sizes) - len(leading)))

    def function(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return shift + scale * x

    graph = traced(function, ("batch", *sizes), numbers, numbers)
    fuse(graph)
    assert count(graph, NORM) == 1
    assert count(graph, aten.mul.Tensor) == count(graph, aten.add.Tensor) == 0
    filled = [batch if n == "batch" else int(n) for n in numbers]
    given = random(seed, batch, *sizes), random(seed + 1, *filled), random(seed + 2, *filled)
    wide = [t.double() for t in given]
    torch.testing.assert_close(graph(*wide), function(*wide), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "numbers",
    [
        ((1, 1, 4), (1, 1, 4)),  # of the last dimension
        (("batch", 1, 1), ("batch", 1, 1)),  # of rows: the channels would be symbolic alone
        ((1, 3, 1), (1, 3, 4)),
        ((1, 3, 1), (1, 1, 1)),
        ((3, 1), (3, 1)),
    ],
)
def test_other_sums_stay(numbers: tuple[tuple[int | str, ...], tuple[int | str, ...]]) -> None:
    """Numbers that are not of the same channels, or not of leading ones, are left alone."""
    graph = traced(lambda x, a, b: x * a + b, ("batch", 3, 4), *numbers)
    fuse(graph)
    assert count(graph, NORM) == 0


def test_a_product_that_is_used_again_stays() -> None:
    """Fusing would compute it twice."""
    channels = (1, 3, 1)
    graph = traced(lambda x, a, b: (x * a + b) * (x * a), ("batch", 3, 4), channels, channels)
    simplify(graph)
    fuse(graph)
    assert count(graph, NORM) == 0


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_an_only_entry_is_not_copied(axis: int) -> None:
    """Selecting the only entry is a view; selecting one of two is not."""
    shape = ["batch", 2, 4]
    shape.insert(axis if axis >= 0 else 3, 1)
    graph = traced(lambda x: x.select(axis, 0) + x.select(-2 if axis == 1 else 2, 0).sum(), shape)
    simplify(graph)
    assert count(graph, aten.squeeze.dim) == 1
    x = random(0, *(3 if n == "batch" else n for n in shape))
    assert torch.equal(graph(x), x.select(axis, 0) + x.select(-2 if axis == 1 else 2, 0).sum())


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(-3, 0), st.integers(-3, 0)),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_convolution_pads_less(
    padding: tuple[int, int], crop: tuple[int, int], stride: int, even: bool, seed: int
) -> None:
    """Cropping what a convolution padded is less padding, if both sides are cropped alike."""
    widths = [crop[1], crop[1] if even else 0, crop[0], crop[0]]

    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = aten.convolution(x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], 1)
        return aten.constant_pad_nd(y, widths)

    graph = traced(function, ("batch", 3, 17, 18), (2, 3, 3, 2))
    simplify(graph)
    cropped = any(widths) and stride == 1
    less = (
        cropped
        and (even or crop[1] == 0)
        and all(p >= -c for p, c in zip(padding, crop, strict=True))
    )
    if less:
        assert count(graph, aten.constant_pad_nd.default) == 0
    given = random(seed, 2, 3, 17, 18).double(), random(seed + 1, 2, 3, 3, 2).double()
    torch.testing.assert_close(graph(*given), function(*given), rtol=1e-12, atol=1e-12)


def test_gelu_of_transformers() -> None:
    """While tracing, the formula of transformers is one operator with the same result."""
    formula = NewGELUActivation.forward
    x = random(0, 100).double() * 4
    wanted = NewGELUActivation()(x)
    with one_gelu():
        graph = traced(NewGELUActivation(), ("batch", 4))
        got = NewGELUActivation()(x)
    assert count(graph, aten.gelu.default) == 1
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert NewGELUActivation.forward is formula
