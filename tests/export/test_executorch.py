"""Rewrites for ExecuTorch are exact; lowered steps equal ONNX Runtime and eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import example as given_example
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from edge_sdk.bundle.manifest import Bundle, Graph, Manifest
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import ClientSegment, SplitModel
from export.lowering.decompositions import activations
from export.lowering.executorch import lower
from export.lowering.rewrites import rewrite
from export.lowering.trace import trace
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.optimizers import get_optimizer
from export.steps.predict import forward
from tests.lib.models import CLASSES, IMAGE, conv_model, example, text_model

aten = torch.ops.aten
MAX_BATCH = 8


class Call(nn.Module):
    """A function as a module, with constants."""

    def __init__(self, function: Callable[..., Any], **constants: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def forward(self, *tensors: Tensor) -> Any:
        """Return the result of the function."""
        return self.function(*tensors, **dict(self.named_buffers()))


def rewritten(
    function: Callable[..., Any], *tensors: Tensor, **constants: Tensor
) -> ExportedProgram:
    """Trace and rewrite a function; the first dimension of the first tensor is symbolic."""
    dynamic = ({0: Dim("batch", min=1, max=4096)}, *(None for _ in tensors[1:]))
    program = export(
        Call(function, **constants).eval(), tensors, dynamic_shapes={"tensors": dynamic}
    )
    return rewrite(program.run_decompositions())


def targets(program: ExportedProgram) -> set[Any]:
    """Return the operators of a program."""
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(
    function: Callable[..., Any], program: ExportedProgram, *tensors: Tensor, **constants: Tensor
) -> None:
    """Check that a program equals eager PyTorch in float64, up to float32 rounding."""
    got = program.module()(*tensors)
    want = function(
        *(t.double() if t.is_floating_point() else t for t in tensors),
        **{n: t.double() for n, t in constants.items()},
    )
    for a, b in zip(
        got if isinstance(got, tuple) else (got,),
        want if isinstance(want, tuple) else (want,),
        strict=True,
    ):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max().item()
        assert error <= 1e-5 * (1 + b.abs().max().item()), error


CONVS = {
    "n": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "c_in": st.integers(1, 3),
    "c_out": st.integers(1, 3),
    "size": st.tuples(st.integers(4, 7), st.integers(4, 7)),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 4), st.integers(0, 4)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "bias": st.booleans(),
    "dims": st.integers(1, 2),
    "transposed": st.booleans(),
}


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(**CONVS)
@given_example(
    n=2, groups=3, c_in=1, c_out=2, size=(6, 6), kernel=(3, 3), stride=(2, 2), padding=(1, 1),
    dilation=(1, 1), bias=True, dims=2, transposed=False,
)  # fmt: skip
def test_convolution(
    n: int,
    groups: int,
    c_in: int,
    c_out: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
    dims: int,
    transposed: bool,
) -> None:
    """A convolution whose weight is an input becomes products, also strided or transposed."""
    extra = [s - 1 for s in stride] if transposed else [0, 0]
    settings = [list(v[:dims]) for v in (stride, padding, dilation, extra)]
    shape = (c_in * groups, c_out) if transposed else (c_out * groups, c_in)
    x = random(n + 1, c_in * groups, *size[:dims])
    weight = random(*shape, *kernel[:dims], seed=1)
    tensors = [x, weight, *([random(c_out * groups, seed=2)] if bias else [])]

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        stride, padding, dilation, extra = settings
        return aten.convolution(
            x, weight, bias, stride, padding, dilation, transposed, extra, groups
        )

    try:
        assume(function(*tensors).numel() > 0)
    except RuntimeError:  # the output has no position
        assume(False)
    program = rewritten(function, *tensors)
    assert aten.convolution.default not in targets(program)
    assert_same(function, program, *tensors)
    assert_same(function, program, random(5, *x.shape[1:], seed=3), *tensors[1:])


def test_a_convolution_with_a_constant_weight_stays() -> None:
    """XNNPACK has kernels for such a convolution."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight)

    weight = random(4, 3, 3, 3)
    program = rewritten(function, random(2, 3, 5, 5), weight=weight)
    assert aten.convolution.default in targets(program)
    assert_same(function, program, random(3, 3, 5, 5), weight=weight)


def test_products() -> None:
    """No mm or addmm is left, and a transposed factor is not transposed again."""

    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = nn.functional.linear(x, w, b)
        return y, y @ w, torch.addmm(b, y, b.unsqueeze(1) * b, beta=0.5, alpha=2.0), y.t() @ x

    tensors = random(4, 5), random(3, 5, seed=1), random(3, seed=2)
    program = rewritten(function, *tensors)
    assert not targets(program) & {aten.mm.default, aten.addmm.default}
    assert aten.linear.default in targets(program)
    assert_same(function, program, *tensors)
    assert_same(function, program, random(1, 5), *tensors[1:])


def test_a_factor_that_is_transposed_twice_is_not_transposed() -> None:
    """Such as the token table of a tied head in the backward pass, which is large."""

    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        back = w.permute(1, 0).permute(1, 0)
        return x @ back, torch.addmm(b, x, back), x @ back.permute(1, 0).permute(1, 0)

    tensors = random(4, 5), random(5, 3, seed=1), random(3, seed=2)
    program = rewritten(function, *tensors)
    assert not targets(program) & {aten.permute.default, aten.permute_copy.default}
    assert aten.bmm.default in targets(program)
    assert_same(function, program, *tensors)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [[0], [3], [0, 1], [2, 3], [0, 2, 3], [1], [0, 1, 2, 3]])
def test_sums_and_means(dims: list[int], keepdim: bool) -> None:
    """Sums over leading, trailing and symbolic dimensions become products."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(dims, keepdim), x.mean(dims, keepdim)

    program = rewritten(function, random(4, 3, 2, 5))
    assert (aten.sum.dim_IntList in targets(program)) == (dims == [1])
    assert (aten.mean.dim in targets(program)) == (dims not in ([3], [2, 3]))
    assert_same(function, program, random(7, 3, 2, 5))


@pytest.mark.parametrize("flat", [False, True])
def test_a_sum_of_many_rows_is_as_exact_as_one_of_few(flat: bool) -> None:
    """XNNPACK adds rows one by one; in two stages the error does not grow with all of them."""

    def total(x: Tensor) -> Tensor:
        return x.reshape(-1, 8).sum(0) if flat else x.sum((0, 1))

    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    x = random(64, 65, 8) * 0.3 + 0.5
    rows = ({0: Dim("rows", min=1, max=64)},)
    program = export(Call(total), (x,), dynamic_shapes={"tensors": rows})
    data = lower({"sum": program.run_decompositions()})
    method = runtime.load_program(data).load_method("sum")
    assert method is not None
    for some in (x, x[:37]):
        (got,) = method.execute([some])
        want = some.double().sum((0, 1))
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("terms", "bound"), [(50257, 1e-6), (32000, 1e-6), (2053, 3e-6), (2048 * 3, 1e-6)]
)
def test_products_and_sums_of_many_terms_are_exact(terms: int, bound: float) -> None:
    """Such as the gradient of logits of a large vocabulary; 2,053 is a prime, and stays whole."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x @ w, x.sum(1), x.mean(1, keepdim=True)

    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    x, w = random(4, terms) * 0.1 + 0.5, random(terms, 3, seed=1) * 0.1 + 0.5
    rows = ({0: Dim("rows", min=1, max=4)}, None)
    program = export(Call(function), (x, w), dynamic_shapes={"tensors": rows})
    data = lower({"f": program.run_decompositions()})
    method = runtime.load_program(data).load_method("f")
    assert method is not None
    for some in (x, x[:3]):
        for got, want in zip(method.execute([some, w]), function(some.double(), w.double()),
                             strict=True):  # fmt: skip
            assert got.shape == want.shape
            torch.testing.assert_close(got.double(), want, rtol=bound, atol=0)


def test_elementwise() -> None:
    """The gradients of ReLU, ReLU6 and GELU use no comparisons and no erf."""

    def function(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        relu = activations.threshold_backward(g, torch.relu(x), 0)
        relu6 = activations.hardtanh_backward(g, x, 0, 6)
        gelu = aten.gelu_backward(g, x)
        return relu, relu6, gelu, torch.erf(x) + 1

    x = torch.cat(
        [torch.linspace(-7, 7, 2001), torch.tensor([0.0, 6.0, 1e-7, -1e-7, 1e-40, 0.49, 0.01])]
    )
    x = x.reshape(-1, 1)
    program = rewritten(function, x, random(1, 4))
    assert not targets(program) & {aten.erf.default, aten._to_copy.default}
    assert_same(function, program, x, random(1, 4))


def test_gelu_by_its_approximation() -> None:
    """XNNPACK computes every GELU exactly, so the approximation is left to other operators."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        gelu = torch.nn.functional.gelu
        return gelu(x), gelu(x, approximate="tanh")

    x = torch.linspace(-6, 6, 2001).reshape(-1, 1)
    program = rewritten(function, x)
    found = [node for node in program.graph.nodes if node.target is aten.gelu.default]
    assert [node.kwargs for node in found] == [{}]
    assert_same(function, program, x)


def test_rounding() -> None:
    """Codes are rounded half to even, exactly as in torch."""

    def function(x: Tensor) -> Tensor:
        return torch.round(x).clamp(-127, 127)

    x = torch.cat([torch.arange(-260, 261) / 2, random(2000) * 60, torch.tensor([0.49999997])])
    program = rewritten(function, x)
    assert aten.round.default not in targets(program)
    assert torch.equal(program.module()(x), function(x))


def test_strided_slices() -> None:
    """A slice with a step becomes a view and a slice without a step."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x[:, ::2], x[:, 1:6:3], x[:, -5::2] * 2, x[:, 2:3:2]

    program = rewritten(function, random(3, 7, 2))
    steps = [n.args[4] for n in program.graph.nodes if n.target is aten.slice.Tensor and n.args[4:]]
    assert all(step == 1 for step in steps)
    assert_same(function, program, random(5, 7, 2))


def test_padding() -> None:
    """Padding that crops becomes slices; padding with infinity uses the largest float."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        cropped = nn.functional.pad(x, (-1, 2, 1, -2), value=0.5)
        return cropped, nn.functional.pad(x, (1, 1), value=-math.inf).amax(-1)

    program = rewritten(function, random(3, 5, 6))
    pads = [n.args for n in program.graph.nodes if n.target is aten.constant_pad_nd.default]
    assert pads
    assert all(math.isfinite(value) and min(pad) >= 0 for _, pad, value in pads)
    assert_same(function, program, random(5, 5, 6))


def test_superfluous_views() -> None:
    """A view to the same shape is removed, but an output remains a tensor of its own."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1, 4) + 1, x.view(-1, 4)

    program = rewritten(function, random(3, 4))
    views = [node for node in program.graph.nodes if node.target is aten.view_copy.default]
    assert len(views) == 1
    assert_same(function, program, random(2, 4))


class Frozen(nn.Module):
    """A frozen linear layer and a convolution with frozen weights around a trainable bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1).requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = h + torch.relu(self.conv(h + self.bias))
        return result


def client_steps(model: SplitModel, x: Tensor, optimizer: str = "sgd") -> ClientSteps:
    """Return the steps at cut 2, with the limits of a tier for ExecuTorch."""
    model.add_heads([2], x, CLASSES)
    limits = {"batch": MAX_BATCH, "seq": x.shape[1]}
    return ClientSteps(
        ClientSegment(model, 2), get_optimizer(optimizer), get_codec("int8"), x, CLASSES, limits
    )


def bundle_of(steps: ClientSteps, data: bytes) -> Bundle:
    """Return a bundle for a lowered file."""
    graphs = {s.name: Graph("0" * 64, s.inputs, s.outputs) for s in all_steps(steps)}
    manifest = Manifest(
        tier="tier", cut=2, runtime="executorch", task="classes", classes=CLASSES,
        limits=steps.limits, heads=("aux.2",), optimizer="sgd", codec="int8",
        packed=steps.packed, state=steps.state, graphs=graphs, initial_state="0" * 64,
        constants=(), blobs={"0" * 64: len(data)},
    )  # fmt: skip
    initial = {n: t.numpy() for n, t in steps.initial.items()}
    return Bundle(manifest, dict.fromkeys(graphs, data), initial)


def lowered(steps: ClientSteps) -> bytes:
    """Return the file of all steps."""
    return lower({step.name: trace(step) for step in all_steps(steps)})


@pytest.fixture(scope="module")
def conv() -> tuple[ClientSteps, bytes]:
    """A file of a model with convolutions, one of them frozen, a stride and GroupNorm."""
    pytest.importorskip("executorch")
    model = conv_model()
    model.block[0] = Frozen(6)
    model.block[1] = model.block[2]
    steps = client_steps(model, example(IMAGE))
    return steps, lowered(steps)


@pytest.fixture(scope="module")
def text() -> tuple[ClientSteps, bytes]:
    """A file of a model with embeddings, attention and GELU."""
    pytest.importorskip("executorch")
    x = torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(0))
    steps = client_steps(text_model(), x, "adamw")
    return steps, lowered(steps)


def draw(steps: ClientSteps, rows: int, seed: int) -> dict[str, Array]:
    """Return a batch with hyper-parameters."""
    generator = torch.Generator().manual_seed(seed)
    x = random(rows, *IMAGE, seed=seed)
    if steps.x.dtype == "int64":
        x = torch.randint(0, 12, (rows, 5), generator=generator)
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    hyper = {n: np.asarray(v, np.float32) for n, v in steps.optimizer.hyper.items()}
    hyper["max_norm"] = np.asarray(0.0, np.float32)
    if "eps" in hyper:  # with a small eps, an AdamW step is the sign of rounding errors
        hyper["eps"] = np.asarray(1e-2, np.float32)
    return {"x": x.numpy(), "y": y.numpy(), **hyper}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "text"])
def test_steps(kind: str, request: pytest.FixtureRequest) -> None:
    """Steps of several sizes give the state, loss, logits and codes of eager PyTorch."""
    from edge_sdk.runtime.executorch import ExecutorchRuntime

    steps, data = request.getfixturevalue(kind)
    runtime = ExecutorchRuntime(bundle_of(steps, data))
    graphs = {step.name: step for step in all_steps(steps)}
    state = dict(steps.initial) | dict(steps.slots)
    for seed, rows in enumerate((MAX_BATCH, 1, 3)):
        batch = draw(steps, rows, seed)
        got = runtime.run("train", batch)
        given = {n: torch.from_numpy(np.asarray(v)) for n, v in batch.items()}
        want = graphs["train"].function(dict(steps.constants), {**state, **given})
        state = {name: want[f"next/{name}"].detach() for name in state}
        compare(got, want)
    after = runtime.get_state()
    for name in steps.initial:
        change = (state[name] - steps.initial[name]).abs().max().item()
        assert np.abs(after[name] - state[name].numpy()).max() <= 1e-3 * change + 1e-6, name
    for name in ("predict", "forward"):
        step = graphs[name]
        x = draw(steps, 2, 9)["x"]
        wanted = step.function(dict(steps.constants), {**state, "x": torch.from_numpy(x)})
        compare(runtime.run(name, {"x": x}), wanted)


def compare(got: dict[str, Array], want: dict[str, Tensor]) -> None:
    """Check that results are equal up to rounding; codes may differ by one."""
    for name, value in got.items():
        wanted = want[name].detach().double().numpy()
        slack = 1.0 if value.dtype == np.int8 else 1e-4 * (1 + np.abs(wanted).max())
        assert value.shape == wanted.shape
        assert np.abs(value - wanted).max() <= slack, name


def test_xnnpack_is_left_as_it_was(conv: tuple[ClientSteps, bytes]) -> None:
    """Lowering shortens XNNPACK's list of passes only while it runs."""
    from executorch.backends.xnnpack import _passes, xnnpack_preprocess

    assert xnnpack_preprocess.XNNPACKPassManager is _passes.XNNPACKPassManager


@pytest.mark.slow
def test_same_bytes(conv: tuple[ClientSteps, bytes]) -> None:
    """Lowering twice gives the same file."""
    steps, _ = conv
    assert len({lower({"forward": trace(forward(steps))}) for _ in range(2)}) == 1


def test_constants_are_stored_once(conv: tuple[ClientSteps, bytes]) -> None:
    """Three methods share a large frozen weight, used forward and backward."""
    width = 256
    torch.manual_seed(0)
    frozen = nn.Linear(width, width, bias=False).requires_grad_(False)
    blocks = [frozen, nn.Linear(width, 6), nn.Identity()]
    model = SplitModel(nn.Linear(6, width), blocks, nn.Linear(6, CLASSES))
    steps = client_steps(model, random(4, 6))
    size = len(lowered(steps))
    assert 4 * width**2 < size < 1.5 * 4 * width**2


def test_outputs_stay_valid(conv: tuple[ClientSteps, bytes]) -> None:
    """The next step does not change earlier outputs, and setting a state copies it."""
    from edge_sdk.runtime.executorch import ExecutorchRuntime

    steps, data = conv
    runtime = ExecutorchRuntime(bundle_of(steps, data))
    given = {n: t.numpy().copy() for n, t in steps.initial.items()}
    runtime.set_state(given)
    for tensor in given.values():
        tensor[...] = math.nan
    first = runtime.run("train", draw(steps, 4, 0))
    kept = {n: v.copy() for n, v in first.items()}
    runtime.run("train", draw(steps, 4, 1))
    for name, value in first.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, kept[name])


def test_wrong_inputs(conv: tuple[ClientSteps, bytes]) -> None:
    """The error names a wrong input; the binding would accept some without an error."""
    from edge_sdk.runtime.executorch import ExecutorchRuntime

    steps, data = conv
    runtime = ExecutorchRuntime(bundle_of(steps, data))
    batch = draw(steps, MAX_BATCH + 1, 0)
    with pytest.raises(DataError, match=f"batch of {MAX_BATCH + 1}.*1 to {MAX_BATCH}"):
        runtime.run("train", batch)
    with pytest.raises(DataError, match="needs the input 'y'"):
        runtime.run("train", {"x": batch["x"][:2]})
    with pytest.raises(DataError, match="x is float64"):
        runtime.run("predict", {"x": batch["x"][:2].astype(np.float64)})
    with pytest.raises(DataError, match=r"x is float32 \[2, 8, 8\]"):
        runtime.run("predict", {"x": batch["x"][:2, 0]})
    with pytest.raises(BundleError, match="is missing"):
        runtime.set_state({})


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"x" * len(d)])
def test_damaged_file(conv: tuple[ClientSteps, bytes], damage: Callable[[bytes], bytes]) -> None:
    """A file that ExecuTorch cannot read, or that lacks a method, is refused."""
    from edge_sdk.runtime.executorch import ExecutorchRuntime

    steps, data = conv
    bundle = bundle_of(steps, damage(data))
    with pytest.raises(BundleError, match="export it"):
        ExecutorchRuntime(bundle)
    more = replace(
        bundle.manifest, graphs=bundle.manifest.graphs | {"more": bundle.manifest.graphs["train"]}
    )
    with pytest.raises(BundleError, match="no method 'more'"):
        ExecutorchRuntime(replace(bundle_of(steps, data), manifest=more))
