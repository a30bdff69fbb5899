"""Codecs: the loss of packing is bounded, and packing does not affect gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_sdk.protocol.tensors import check_tensors
from export.cutting.split_model import channel_axis
from export.errors import ExportError
from export.packing.codecs import CODECS, get_codec

SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)


def activations(shape: tuple[int, ...], seed: int, spread: int) -> Tensor:
    """Return activations whose channels differ in size by up to ``10**spread``; some are zero."""
    generator = torch.Generator().manual_seed(seed)
    axis = channel_axis(torch.empty(shape))
    powers = torch.rand(shape[axis], generator=generator) * spread
    zero = torch.rand(shape[axis], generator=generator) < 0.2
    sizes = torch.where(zero, 0.0, 10.0**powers)
    per_channel = [1] * len(shape)
    per_channel[axis] = -1
    return torch.randn(shape, generator=generator) * sizes.reshape(per_channel)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.integers(0, 30))
def test_int8_error_is_at_most_half_a_code_per_channel(
    shape: tuple[int, ...], seed: int, spread: int
) -> None:
    """A channel's error depends on its own largest value, not on that of its neighbours."""
    h = activations(shape, seed, spread)
    codec = get_codec("int8")
    axis = channel_axis(h)
    parts = codec.pack(h, axis)
    error = (codec.unpack(parts).double() - h.double()).abs().movedim(axis, 0).flatten(1).amax(1)
    largest = h.double().abs().movedim(axis, 0).flatten(1).amax(1)
    assert (error <= largest / 127 / 2 * (1 + 1e-4) + 1e-14).all(), (error, largest)
    bound = codec.error_bound(parts).expand(shape).double()
    assert ((codec.unpack(parts).double() - h).abs() <= bound * (1 + 1e-4)).all()


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.integers(0, 4))
@example((1, 3), 0, 0)
def test_fp16_error_is_that_of_rounding(shape: tuple[int, ...], seed: int, spread: int) -> None:
    """Within the range of half precision, the error is half a unit in the last place."""
    h = activations(shape, seed, spread).clamp(-65504, 65504)
    codec = get_codec("fp16")
    parts = codec.pack(h, channel_axis(h))
    error = (codec.unpack(parts) - h).abs()
    assert (error <= codec.error_bound(parts)).all()
    assert (error <= h.abs() * 2**-11 + 2**-25).all()


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize(
    ("shape", "symbolic", "axis"),
    [
        ((3, 5), ("batch", 5), 1),
        ((2, 4, 6), ("batch", 4, 6), 2),
        ((2, 4, 6), ("batch", "seq", 6), 2),
        ((2, 4, 6), ("batch", 4, 6), 1),
        ((2, 3, 4, 5), ("batch", 3, 4, 5), 1),
    ],
)
def test_specs_are_what_pack_produces(
    name: str, shape: tuple[int, ...], symbolic: tuple[int | str, ...], axis: int
) -> None:
    """Names, dtypes and shapes match, so that a hub can check what it receives."""
    codec = get_codec(name)
    parts = {key: part.numpy() for key, part in codec.pack(torch.randn(shape), axis).items()}
    symbols: dict[str, int] = {}
    check_tensors(parts, codec.specs(symbolic, axis), symbols)
    named = zip(symbolic, shape, strict=True)
    assert symbols == {symbol: size for symbol, size in named if isinstance(symbol, str)}
    assert codec.unpack({key: torch.from_numpy(part) for key, part in parts.items()}).shape == shape


def test_int8_is_four_times_smaller() -> None:
    """The size on the wire is a quarter, without the scales."""
    shape = ("batch", 8, 4, 4)
    int8, fp16 = (get_codec(name).specs(shape, 1) for name in ("int8", "fp16"))
    assert int8[0].nbytes(batch=10) == 10 * 8 * 4 * 4
    assert fp16[0].nbytes(batch=10) == 2 * 10 * 8 * 4 * 4
    assert int8[1].nbytes() == 8 * 4


def test_channels_are_where_each_form_has_them() -> None:
    """There is one scale per channel: the last axis of (B, T, C), the second of other shapes."""
    for shape, axis, first in (
        ((4, 3), 1, False),
        ((4, 5, 3), 2, False),
        ((4, 3, 5), 1, True),
        ((4, 3, 5, 6), 1, False),
    ):
        h = torch.zeros(shape)
        h.movedim(axis, 0)[1] = 2.0
        assert channel_axis(h, channels_first=first) == axis
        scale = get_codec("int8").pack(h, axis)["h.scale"]
        assert scale.shape == tuple(3 if i == axis else 1 for i in range(len(shape)))
        scale = scale.flatten()
        assert scale[1].item() == pytest.approx(2 / 127)
        assert scale[0].item() < 1e-12
        assert scale[2].item() < 1e-12


def test_zero_channels_stay_zero() -> None:
    """There is no division by zero: codes and values of a zero channel are zero."""
    codec = get_codec("int8")
    h = torch.zeros(2, 3, 2, 2)
    h[:, 1] = torch.randn(2, 2, 2)
    parts = codec.pack(h, 1)
    back = codec.unpack(parts)
    assert torch.isfinite(parts["h.scale"]).all()
    assert (parts["h.scale"] > 0).all()
    assert (parts["h.q"][:, [0, 2]] == 0).all()
    assert (back[:, [0, 2]] == 0).all()
    assert (back[:, 1] != 0).any()


def test_int8_codes_reach_the_ends_and_no_further() -> None:
    """The largest magnitude is 127 on both sides; -128 is never used."""
    parts = get_codec("int8").pack(torch.tensor([[3.0, -1.0], [-3.0, 0.5]]), 1)
    assert parts["h.q"].dtype == torch.int8
    assert parts["h.q"].tolist() == [[127, -127], [-127, 64]]


@pytest.mark.parametrize("value", [1e30, 3e38, 1e-30, 1e-38])
def test_int8_takes_huge_and_tiny_values(value: float) -> None:
    """Nothing overflows in float32; values below 1e-12 may become zero."""
    codec = get_codec("int8")
    h = torch.tensor([[value, 1.0], [-value / 3, -1.0]])
    parts = codec.pack(h, 1)
    back = codec.unpack(parts)
    assert torch.isfinite(back).all()
    error = (back.double() - h.double()).abs()
    assert (error <= codec.error_bound(parts).double() * (1 + 1e-4)).all()
    assert error[0, 0].item() <= max(value / 127, 1e-12)


def test_fp16_clamps_what_is_out_of_range() -> None:
    """Values are clamped to the largest half, because infinity would spoil the trunk."""
    codec = get_codec("fp16")
    back = codec.unpack(codec.pack(torch.tensor([[1e9, -1e9, 65504.0, 65519.0, 1.0]]), 1))
    assert back.tolist() == [[65504.0, -65504.0, 65504.0, 65504.0, 1.0]]


@pytest.mark.parametrize("name", list(CODECS))
def test_no_gradient_flows_through_packing(name: str) -> None:
    """Packed parts are detached from the autograd graph."""
    h = torch.randn(3, 4, requires_grad=True)
    activations = h * 2
    parts = get_codec(name).pack(activations, 1)
    assert activations.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    assert not get_codec(name).unpack(parts).requires_grad


@pytest.mark.parametrize("name", list(CODECS))
def test_packing_does_not_change_the_activations(name: str) -> None:
    """The heads get the same tensor."""
    h = torch.randn(3, 4)
    before = h.clone()
    parts = get_codec(name).pack(h, 1)
    assert all(np.shares_memory(part.numpy(), h.numpy()) is False for part in parts.values())
    assert torch.equal(h, before)


def test_unknown_codec() -> None:
    """The error lists the known codecs."""
    with pytest.raises(ExportError, match=r"unknown codec 'zip'; there are int8, fp16"):
        get_codec("zip")
