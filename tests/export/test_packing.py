"""Codecs: the loss of packing is bounded, each row is packed alone, NaN and infinity stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import Array, TensorSpec, check_tensors
from edge_sdk.runtime.executorch_binding import load_binding, quiet
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName, lower
from export.packing.codecs import CODECS, Codec, get_codec
from export.steps.step import Step, Tensors

SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)


def axis_of(shape: tuple[int, ...]) -> int:
    """The axis of the channels as most models have it: the last of texts, the second of images."""
    return 2 if len(shape) == 3 else 1


def activations(shape: tuple[int, ...], seed: int, spread: int) -> Tensor:
    """Return activations whose channels differ in size by up to ``10**spread``; some are zero."""
    generator = torch.Generator().manual_seed(seed)
    axis = axis_of(shape)
    powers = torch.rand(shape[axis], generator=generator) * spread
    zero = torch.rand(shape[axis], generator=generator) < 0.2
    sizes = torch.where(zero, 0.0, 10.0**powers)
    per_channel = [1] * len(shape)
    per_channel[axis] = -1
    return torch.randn(shape, generator=generator) * sizes.reshape(per_channel)


def groups(h: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The largest magnitude in the group of each value, by the shape of the scales."""
    shared = [axis for axis, n in enumerate(parts["h.scale"].shape) if n == 1]
    return h.double().abs().amax(shared, keepdim=True) if shared else h.double().abs()


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.integers(0, 30))
def test_int8_error_is_at_most_half_a_code_of_the_group(
    shape: tuple[int, ...], seed: int, spread: int
) -> None:
    """An error depends on the largest value of its own group, not on the others."""
    h = activations(shape, seed, spread)
    codec = get_codec("int8")
    parts = codec.pack(h, axis_of(shape))
    error = (codec.unpack(parts).double() - h.double()).abs()
    assert (error <= groups(h, parts) / 127 / 2 * (1 + 1e-4) + 1e-14).all(), error
    bound = codec.error_bound(parts).expand(shape).double()
    assert (error <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", list(CODECS))
@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31), first=st.booleans())
def test_a_row_is_packed_alone(name: str, shape: tuple[int, ...], seed: int, first: bool) -> None:
    """What the hub reads of a row does not depend on the rest of the batch, bit for bit."""
    codec, axis = get_codec(name), 1 if first else len(shape) - 1
    h = activations(shape, seed, 6)
    together = codec.unpack(codec.pack(h, axis))
    for row in range(len(h)):
        assert torch.equal(codec.unpack(codec.pack(h[row : row + 1], axis))[0], together[row])


def test_a_position_of_a_text_depends_neither_on_later_ones_nor_on_padding() -> None:
    """Decoders do not mask padding: the activations of padding are as large as others."""
    h = torch.randn(3, 9, 6)
    h[:, 5:] *= 1e4
    for codec in CODECS.values():
        whole, short = codec.unpack(codec.pack(h, 2)), codec.unpack(codec.pack(h[:, :5], 2))
        assert torch.equal(whole[:, :5], short)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.integers(0, 4))
@example((1, 3), 0, 0)
def test_fp16_error_is_that_of_rounding(shape: tuple[int, ...], seed: int, spread: int) -> None:
    """Within the range of half precision, the error is half a unit in the last place."""
    h = activations(shape, seed, spread).clamp(-65504, 65504)
    codec = get_codec("fp16")
    parts = codec.pack(h, axis_of(shape))
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
        ((2, 3, 8, 5), ("batch", 3, 8, 5), 1),
        ((2, 40, 3, 2), ("batch", 40, 3, 2), 1),
        ((2, 3, 4, 5), ("batch", 3, 4, 5), 3),
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


@pytest.mark.parametrize(
    ("shape", "axis", "scales", "share"),
    [
        ((32, 16, 16), 1, (32, 1, 1), 0.016),
        ((64, 8, 8), 1, (64, 1, 1), 0.063),
        ((512, 4, 4), 1, (1, 4, 4), 0.008),
        ((24, 4, 4), 1, (1, 1, 1), 0.011),
        ((64, 100), 1, (64, 1), 0.040),
        ((65, 192), 2, (65, 1), 0.021),
        ((128, 256), 2, (128, 1), 0.016),
        ((7, 7, 96), 3, (7, 7, 1), 0.042),
        ((64,), 1, (1,), 0.063),
    ],
)
def test_int8_has_a_scale_per_group(
    shape: tuple[int, ...], axis: int, scales: tuple[int, ...], share: float
) -> None:
    """Scales take a small share of the bytes of the codes, and are each of one row."""
    codes, scale = get_codec("int8").specs(("batch", *shape), axis)
    assert scale.shape == ("batch", *scales)
    assert codes.nbytes(batch=10) == 10 * math.prod(shape)
    assert scale.nbytes(batch=10) <= share * codes.nbytes(batch=10)
    assert get_codec("fp16").specs(("batch", *shape), axis)[0].nbytes(batch=1) == 2 * codes.nbytes(
        batch=1
    )


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("scales", [(1, 3, 1, 1), ("batch", 3, 1, 1), ("batch", 1, 1, 1)])
def test_packing_as_a_manifest_says(name: str, scales: tuple[int | str, ...]) -> None:
    """A bundle of an earlier version has one scale per channel of the whole batch."""
    codec, h = get_codec(name), torch.randn(4, 3, 5, 5)
    shapes = {spec.name: spec.shape for spec in codec.specs(("batch", 3, 5, 5), 1)}
    if name == "int8":
        shapes["h.scale"] = scales
    parts = codec.pack_as(h, shapes)
    for key, shape in shapes.items():
        assert parts[key].shape == tuple(4 if n == "batch" else n for n in shape)
    assert ((codec.unpack(parts) - h).abs() <= codec.error_bound(parts) * (1 + 1e-4)).all()
    same = codec.pack_as(h, {key: part.shape for key, part in parts.items()})
    assert all(torch.equal(same[key], parts[key]) for key in parts)


def test_zero_channels_stay_zero() -> None:
    """There is no division by zero: codes and values of a zero channel are zero."""
    codec = get_codec("int8")
    h = torch.zeros(2, 3, 6, 6)
    h[:, 1] = torch.randn(2, 6, 6)
    parts = codec.pack(h, 1)
    back = codec.unpack(parts)
    assert torch.isfinite(parts["h.scale"]).all()
    assert (parts["h.scale"] > 0).all()
    assert (parts["h.q"][:, [0, 2]] == 0).all()
    assert (back[:, [0, 2]] == 0).all()
    assert (back[:, 1] != 0).any()


def test_int8_codes_reach_the_ends_and_no_further() -> None:
    """The largest magnitude is 127 on both sides; -128 is never used."""
    parts = get_codec("int8").pack(torch.tensor([[3.0, -1.5], [0.25, -0.5]]), 1)
    assert parts["h.q"].dtype == torch.int8
    assert parts["h.q"].tolist() == [[127, -64], [64, -127]]


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("value", [1e30, 3e38, LARGEST, 1e-30, 1e-38])
def test_int8_takes_huge_and_tiny_values(value: float) -> None:
    """Nothing overflows in float32; values below 1e-12 may become zero."""
    codec = get_codec("int8")
    h = torch.tensor([[value, value / 3, -value], [0.0, -value / 2, 1.0]])
    parts = codec.pack(h, 1)
    back = codec.unpack(parts)
    assert torch.isfinite(back).all()
    error = (back.double() - h.double()).abs()
    assert (error <= codec.error_bound(parts).double() * (1 + 1e-4)).all()
    assert error[0, 0].item() <= max(value * 1e-6, 1e-12)


def test_fp16_clamps_what_is_out_of_range() -> None:
    """Finite values are clamped to the largest half, because infinity would spoil the trunk."""
    codec = get_codec("fp16")
    back = codec.unpack(codec.pack(torch.tensor([[1e9, -1e9, 65504.0, 65519.0, 1.0]]), 1))
    assert back.tolist() == [[65504.0, -65504.0, 65504.0, 65504.0, 1.0]]
    assert torch.isfinite(codec.unpack(codec.pack(torch.full((2, 3), -LARGEST), 1))).all()


RUNTIMES: list[RuntimeName] = ["torch", "onnx", "executorch"]


def packing(codec: Codec, shape: tuple[int, ...], axis: int) -> Step:
    """A step that packs its input (batch, ...) and does nothing else."""
    specs = codec.specs(("batch", *shape), axis)

    def function(_: Tensors, given: Tensors) -> Tensors:
        return codec.pack(given["x"], axis)

    x = Port(TensorSpec("x", "float32", ("batch", *shape)), "batch")
    outputs = tuple(Port(spec, "packed") for spec in specs)
    return Step("forward", function, (x,), outputs, limits={"batch": 8})


def opened(runtime: RuntimeName, step: Step) -> Callable[[Array], dict[str, Array]]:
    """Lower a step for a runtime, and return what runs it."""
    file = lower(runtime, [step], {}).files["forward"]
    names = [port.spec.name for port in step.outputs]
    if runtime == "torch":
        return lambda x: {
            n: t.numpy() for n, t in step.function({}, {"x": torch.from_numpy(x)}).items()
        }
    if runtime == "onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x: dict(zip(names, session.run(names, {"x": x}), strict=True))
    with quiet():
        module = load_binding().open(file)

    def run(x: Array, _file: bytes = file) -> dict[str, Array]:  # the module reads the file
        with quiet():
            outputs = module.run_method("forward", [torch.from_numpy(x)])
        return {n: t.numpy().copy() for n, t in zip(names, outputs, strict=True)}

    return run


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 7, 5), 1), ((40, 3, 3), 1), ((5, 3, 3), 1), ((9, 33), 2), ((37,), 1)]
)
def test_what_is_not_finite_stays_so_in_every_runtime(
    runtime: RuntimeName, name: str, shape: tuple[int, ...], axis: int
) -> None:
    """Exactly the rows with NaN or infinity, wherever these are, unpack to what is not finite."""
    codec, rng = get_codec(name), np.random.default_rng(0)
    step = packing(codec, shape, axis)
    run = opened(runtime, step)
    kinds = [[np.nan], [np.inf], [-np.inf], [np.nan, np.inf], [np.inf, -np.inf, np.nan], []]
    for draw in range(30):
        x = rng.standard_normal((5, *shape), dtype=np.float32)
        x *= np.float32(10.0) ** rng.integers(-3, 4)
        bad = np.zeros(5, bool)
        for row in range(5):
            values = kinds[rng.integers(len(kinds))]
            places = rng.choice(math.prod(shape), len(values), replace=False)
            x[row].flat[places] = values
            bad[row] = bool(values)
        if draw % 5 == 0:  # large values are fine; a row of nothing else is not
            x[0] = rng.choice(np.float32([LARGEST, -LARGEST]), shape)
            x[1] = rng.choice([np.nan, np.inf, -np.inf])
            bad[:2] = False, True
        parts = run(x)
        back = codec.unpack({key: torch.from_numpy(part) for key, part in parts.items()})
        assert (~torch.isfinite(back)).flatten(1).any(1).tolist() == bad.tolist()


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
