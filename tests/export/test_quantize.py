"""``predict_int8``: the quantizer, the graphs on both runtimes, the comparison and its bound."""

from __future__ import annotations

import asyncio
import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import BundleError, DataError
from edge_sdk.inference.metrics import softmax
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner, Precision
from export.bundles.quantized import (
    INT8,
    Comparison,
    Figures,
    LossCheck,
    compare,
    predict_int8,
    quantize,
    quantize_matrices,
)
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import WEIGHTS, ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.graph_files import GraphFiles, RuntimeName, lower
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.predict import predict
from export.steps.step import Step
from server_hub.gateway.tokens import TokenFile
from tests.lib.commands import output, refusal
from tests.lib.graph_runs import run_files, verify
from tests.lib.harness import examples, hub_config, running_hub, save_npz
from tests.lib.models import (
    BUILD,
    CLASSES,
    FEATURES,
    IMAGE,
    AttentionBlock,
    MeanHead,
    TokenBlock,
    build,
    conv_model,
    example,
    open_bundle,
    text_model,
    token_model,
)

WORDS = 12
ROWS = 8
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")

RUNTIMES: tuple[RuntimeName, ...] = ("onnx", "executorch")


class InvertedResidual(nn.Module):
    """A block of MobileNetV2: a point-wise, a depth-wise and another point-wise convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = h + self.layers(h)
        return result


class Stem(nn.Module):
    """Embeds tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, positions, width)."""
        h: Tensor = self.embedding(x)
        return h


def mobile_model(width: int = 8) -> SplitModel:
    """Return three inverted residuals whose statistics differ from those of new norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Conv2d(IMAGE[0], width, 3, padding=1)
        blocks = [InvertedResidual(width) for _ in range(3)]
        model = SplitModel(stem, blocks, MeanHead(width, CLASSES))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model


def tokens_model(width: int = 8) -> SplitModel:
    """Return a language model whose auxiliary head reads the embedding table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [AttentionBlock(width), TokenBlock(width), TokenBlock(width)]
        return SplitModel(Stem(width), blocks, nn.Linear(width, WORDS), "tokens")


def texts(rows: int = 8, seed: int = 0) -> Tensor:
    """Random texts of 5 tokens."""
    return torch.randint(0, WORDS, (rows, 5), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Kind:
    """A model with its inputs."""

    build: Callable[[], SplitModel]
    inputs: Callable[[int], Tensor]
    classes: int = CLASSES

    def labels(self, rows: int) -> Array:
        """Return random labels; for texts, some are missing."""
        rng = np.random.default_rng(5)
        if self.build is not tokens_model:
            return rng.integers(0, self.classes, rows)
        return rng.integers(-1, self.classes, (rows, 5))

    def examples(self, rows: int) -> Examples:
        """Return random examples."""
        return Examples(self.inputs(rows).numpy(), self.labels(rows))


KINDS = {
    "conv": Kind(conv_model, lambda rows: example(IMAGE, rows)),
    "mobile": Kind(mobile_model, lambda rows: example(IMAGE, rows)),
    "text": Kind(text_model, texts),
    "tokens": Kind(tokens_model, texts, WORDS),
}


def exported(
    kind: str, folder: Path, runtime: RuntimeName = "onnx", **changes: object
) -> tuple[SplitModel, BundleIndex, Comparison]:
    """Export a kind with int8 for any loss; return model, bundles and comparison."""
    chosen, found = KINDS[kind], {}
    model = chosen.build()
    arguments = {
        "example": chosen.inputs(8),
        "classes": chosen.classes,
        "int8": LossCheck(chosen.examples(20), allow_loss=True),
        "compared": found.__setitem__,
    }
    tier = Tier(2, runtime=runtime, batch=ROWS, precision="int8")
    index = export_bundles(model, {"tier": tier}, folder, **(arguments | changes))  # type: ignore[arg-type]
    return model, index, found["tier"]


def steps_of(model: SplitModel, x: Tensor, classes: int = CLASSES) -> ClientSteps:
    """Return the steps at cut 2."""
    model.add_heads([2], x, classes)
    segment = ClientSegment(model, 2)
    limits = {"batch": ROWS, "seq": x.shape[1]}
    return ClientSteps(segment, get_optimizer("sgd"), get_codec("int8"), x, classes, limits)


def rounded(segment: nn.Module, runtime: RuntimeName) -> nn.Module:
    """Return the segment in float64 with rounded matrices, each by a formula in numpy."""
    axes = {nn.Linear: 0, nn.Conv2d: 0, nn.Embedding: 0}
    for module in segment.modules():
        if type(module) not in axes or (
            runtime == "executorch" and getattr(module, "groups", 1) > 1
        ):
            continue
        w = module.weight.detach().numpy()
        scale = np.abs(w.reshape(len(w), -1)).max(1) / np.float32(127)
        scale[scale == 0] = 1
        scale = scale.reshape(-1, *[1] * (w.ndim - 1))
        module.weight.data = torch.from_numpy(np.rint(w / scale) * scale)
    return segment.double().eval()


# the quantizer


MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1e-40, 1e30, -1e-30])),
)


@settings(max_examples=300, deadline=None)
@given(MATRICES, st.sampled_from([0, 1]))
def test_quantizer(weight: Array, axis: int) -> None:
    """Codes are in range, each channel has one scale, and the error is at most half a scale."""
    quantized = quantize(torch.from_numpy(weight), axis)
    codes, scale = quantized.codes.numpy(), quantized.scale.numpy()
    assert codes.dtype == np.int8
    assert codes.shape == weight.shape
    assert codes.min() >= -127
    assert codes.max() <= 127
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    assert scale.shape == tuple(n if d == axis else 1 for d, n in enumerate(weight.shape))
    error = np.abs(codes.astype(np.float64) * scale - weight)
    assert (error <= scale.astype(np.float64) * (0.5 + 1e-5)).all()
    channels, coded = np.moveaxis(weight, axis, 0), np.moveaxis(codes, axis, 0)
    for channel, code in zip(channels, coded, strict=True):
        if np.abs(channel).max() > 1e-30:
            assert np.abs(code).max() == 127
        elif not channel.any():
            assert not code.any()


def test_closed_form() -> None:
    """A matrix with known codes is quantized exactly."""
    quantized = quantize(torch.tensor([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0], [0.5, -1.0, 0.25]]))
    assert quantized.codes.tolist() == [[127, -63, 0], [0, 0, 0], [64, -127, 32]]
    assert quantized.scale[0].item() == 1.0
    assert quantized.scale[2].item() == np.float32(1) / np.float32(127)
    assert quantized.restore()[1].tolist() == [0.0, 0.0, 0.0]


def test_which_matrices() -> None:
    """Matrices are chosen by kind of module, with the axis of outputs; the rest is float32."""

    class Conv1D(nn.Module):
        """GPT-2's linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6))

        def forward(self, h: Tensor) -> Tensor:
            """Activations (batch, 6)."""
            return h @ self.weight

    class Block(nn.Module):
        """A block with one module of each kind."""

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 2, 3)
            self.grouped = nn.Conv2d(2, 4, 3, groups=2)
            self.norm = nn.GroupNorm(2, 4)
            self.last = nn.Linear(4, 3)
            self.wide = Conv1D()
            self.free = nn.Parameter(torch.randn(6, 3))

        def forward(self, h: Tensor) -> Tensor:
            """Activations (batch, 3)."""
            h = self.norm(self.grouped(self.up(h)))
            result: Tensor = self.wide(self.last(h.mean((2, 3)))) @ self.free
            return result

    torch.manual_seed(0)
    model = SplitModel(
        nn.Identity(), [Block(), nn.Linear(3, 3), nn.Identity()], nn.Linear(3, CLASSES)
    )
    steps = steps_of(model, example(IMAGE))
    found = {n: tuple(q.scale.shape) for n, q in quantize_matrices(steps, "onnx").items()}
    assert found == {
        "block.0.up.weight": (1, 2, 1, 1),
        "block.0.grouped.weight": (4, 1, 1, 1),
        "block.0.last.weight": (3, 1),
        "block.0.wide.weight": (1, 6),
        "block.1.weight": (3, 1),
        "aux.2.hidden.weight": (8, 1),
        "aux.2.out.weight": (CLASSES, 1),
    }
    assert found.keys() - quantize_matrices(steps, "executorch").keys() == {
        "block.0.grouped.weight"
    }


# the graphs


def lowered(steps: ClientSteps, runtime: RuntimeName) -> tuple[Step, GraphFiles]:
    """Return the graph of a segment."""
    if runtime == "executorch":
        pytest.importorskip("executorch")
    matrices = quantize_matrices(steps, runtime)
    step = predict_int8(steps, matrices)
    return step, lower(runtime, [step], {})


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        pytest.param(
            kind,
            runtime,
            marks=pytest.mark.slow if runtime == "executorch" and kind != "conv" else (),
        )
        for kind in KINDS
        for runtime in RUNTIMES
    ],
)
def test_graph(kind: str, runtime: RuntimeName) -> None:
    """The graph takes only x and equals eager PyTorch with rounded matrices."""
    model, chosen = KINDS[kind].build(), KINDS[kind]
    steps = steps_of(model, chosen.inputs(8), chosen.classes)
    step, result = lowered(steps, runtime)
    assert [port.spec for port in step.inputs] == [steps.x]
    assert step.outputs == predict(steps).outputs
    exact = copy.deepcopy(steps.segment).double().eval()
    segment = rounded(steps.segment, runtime)
    for rows in (1, ROWS):
        x = chosen.inputs(rows)
        got = run_files(runtime, result)(step, {"x": x.numpy()})
        with torch.no_grad():
            h, want = segment(x.double() if x.is_floating_point() else x)
            _, before = exact(x.double() if x.is_floating_point() else x)
        np.testing.assert_allclose(got["logits"], want.numpy(), rtol=1e-4, atol=1e-5)
        packed = {spec.name: torch.from_numpy(got[spec.name]) for spec in steps.packed}
        error = (get_codec("int8").unpack(packed) - h).abs()
        assert (error <= packed["h.scale"] * 0.51 + 1e-5).all()
        assert 0 < (before - want).abs().max() < 0.2


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_verified(runtime: RuntimeName) -> None:
    """The graph passes; a graph with one wrong code does not pass."""
    steps = steps_of(text_model(), texts())
    step, result = lowered(steps, runtime)
    verify(steps, step, run_files(runtime, result), texts())
    matrices = quantize_matrices(steps, runtime)
    codes = matrices["block.0.wide.weight"].codes.clone()
    codes[0, 0] -= 40
    wrong = replace(matrices["block.0.wide.weight"], codes=codes)
    other = predict_int8(steps, matrices | {"block.0.wide.weight": wrong})
    with pytest.raises(ExportError, match=r"'predict_int8' differs from eager PyTorch"):
        verify(steps, other, run_files(runtime, result), texts())


def test_onnx_file(tmp_path: Path) -> None:
    """Operators are standard; matrices are int8, which ONNX Runtime converts to float at load."""
    data = lowered(steps_of(text_model(), texts()), "onnx")[1].files[INT8]
    model = onnx.load_model_from_string(data)
    onnx.checker.check_model(model)
    own = {(f.domain, f.name) for f in model.functions}  # operators that are made of others
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    assert all(node.domain == "" or (node.domain, node.op_type) in own for node in nodes)
    codes = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert codes == {
        f"{name}.weight/codes"
        for name in (
            "stem",
            "block.0.wide",
            "block.0.narrow",
            "block.1.qkv",
            "block.1.out",
            "aux.2.hidden",
            "aux.2.out",
        )
    }
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(str(tmp_path / "loaded.onnx")).graph
    left = [t.name for t in loaded.initializer if t.data_type == onnx.TensorProto.INT8]
    assert left == ["stem.weight/codes"]
    users = Counter(node.op_type for node in loaded.node if left[0] in node.input)
    assert users == {"Gather": 1}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_sizes(runtime: RuntimeName) -> None:
    """The file is about four times smaller than the weights, and always the same."""
    width = 128
    torch.manual_seed(0)
    blocks = [TokenBlock(width) for _ in range(3)]
    model = SplitModel(nn.Embedding(WORDS, width), blocks, MeanHead(width, CLASSES))
    steps = steps_of(model, texts())
    files = [lowered(steps, runtime)[1].files[INT8] for _ in range(2)]
    weights = sum(4 * t.numel() for t in steps.initial.values())
    assert weights / 4 < len(files[0]) < 0.3 * weights
    assert files[0] == files[1]


@pytest.mark.slow
def test_same_bundle(tmp_path: Path) -> None:
    """Exporting twice gives the same bundle."""
    indices = [exported("text", tmp_path / str(i))[1] for i in range(2)]
    assert len({index.tiers["tier"].manifest for index in indices}) == 1


@pytest.mark.slow
def test_executorch_bundle(tmp_path: Path) -> None:
    """There are two files, and a device runs the methods of both."""
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    blocks = [nn.Linear(4, 4), nn.Identity(), nn.Identity()]
    model = SplitModel(nn.Linear(3, 4), blocks, nn.Linear(4, CLASSES))
    x = example((3,), 8)
    data = Examples(x.numpy(), np.arange(8))
    found: dict[str, Comparison] = {}
    index = export_bundles(
        model,
        {"tier": Tier(1, runtime="executorch", batch=ROWS, precision="int8")},
        tmp_path / "out",
        example=x,
        classes=CLASSES,
        int8=LossCheck(data, allow_loss=True),
        compared=found.__setitem__,
        verified=False,
    )
    bundle = open_bundle(index, "tier")
    manifest = bundle.manifest
    assert manifest.graphs[INT8].blob != manifest.graphs["predict"].blob
    assert found["tier"].int8.kilobytes == manifest.blobs[manifest.graphs[INT8].blob] / 1000
    learner = Learner(manifest, load_runtime(bundle))
    exact, rounded_ = (learner.predict(data.x, p)[0] for p in PRECISIONS)
    assert 0 < np.abs(exact - rounded_).max() < 0.1


@pytest.fixture(scope="module")
def conv_index(tmp_path_factory: pytest.TempPathFactory) -> BundleIndex:
    """Bundles of ``conv``, not verified; tests must not change them."""
    folder = tmp_path_factory.mktemp("conv") / "out"
    return exported("conv", folder, verified=False, model_path=BUILD)[1]


def trained(bundle: Bundle, seed: int) -> dict[str, Array]:
    """Return another state, with a row of zeros in each matrix."""
    rng = np.random.default_rng(seed)
    state = {
        n: (t + rng.normal(0, 0.3, t.shape)).astype(np.float32)
        for n, t in bundle.initial_state.items()
    }
    for tensor in state.values():
        if tensor.ndim > 1:
            tensor[-1] = 0
    return state


def follows(index: BundleIndex, model: SplitModel, kind: str) -> None:
    """Check answers of int8 after changes of the state: those of the rounded model, in float64."""
    bundle, chosen = open_bundle(index, "tier"), KINDS[kind]
    runtime = load_runtime(bundle)
    learner, fork = Learner(bundle.manifest, runtime), runtime.fork()  # type: ignore[attr-defined]
    x = chosen.inputs(3)
    first = learner.predict(x.numpy(), "int8")[0]
    for seed in range(2):
        state = trained(bundle, seed)
        runtime.set_state(state)
        with torch.no_grad():
            for name, tensor in model.tensors().items():
                if name in state:
                    tensor.copy_(torch.from_numpy(state[name]))
            segment = rounded(ClientSegment(model, 2), "onnx")
            want = segment(x.double() if x.is_floating_point() else x)[1].numpy()
        got = learner.predict(x.numpy(), "int8")[0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        assert not np.allclose(got, first)
        assert not np.allclose(got, learner.predict(x.numpy())[0], rtol=1e-5)
    other = Learner(bundle.manifest, fork).predict(x.numpy(), "int8")[0]
    np.testing.assert_array_equal(other, first)


def test_follows_training(conv_index: BundleIndex) -> None:
    """On ONNX Runtime, int8 answers with the present state; another runtime with its own."""
    model = KINDS["conv"].build()
    model.load(conv_index.folder / WEIGHTS)
    follows(conv_index, model, "conv")


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_texts_follow_training(kind: str, tmp_path: Path) -> None:
    """The same for tables, attention and a head that reads the table."""
    model, index, _ = exported(kind, tmp_path / "out", verified=False)
    follows(index, model, kind)


def test_follows_each_step(conv_index: BundleIndex) -> None:
    """A training step changes the answers of int8."""
    bundle = open_bundle(conv_index, "tier")
    runtime = load_runtime(bundle)
    learner = Learner(bundle.manifest, runtime)
    data = KINDS["conv"].examples(4)
    answers = [learner.predict(data.x, "int8")[0]]
    hyper = {
        port.spec.name: np.asarray(0.1 if port.spec.name == "lr" else 0, np.float32)
        for port in bundle.manifest.graphs["train"].inputs
        if port.role == "hyper"
    }
    for _ in range(2):
        runtime.run("train", {"x": data.x, "y": data.y, **hyper})
        answers.append(learner.predict(data.x, "int8")[0])
        exact = learner.predict(data.x)[0]
        assert np.abs(answers[-1] - exact).max() < np.abs(answers[-1] - answers[-2]).max()


def refuses_trained(bundle: Bundle) -> None:
    """Check that int8 answers with the exported weights, and with no others."""
    runtime = load_runtime(bundle)
    learner = Learner(bundle.manifest, runtime)
    x = KINDS["conv"].inputs(3).numpy()
    before = learner.predict(x, "int8")[0]
    runtime.set_state(trained(bundle, 0))
    with pytest.raises(BundleError, match="holds the weights of the export, and the model has"):
        learner.predict(x, "int8")
    runtime.set_state(bundle.initial_state)
    np.testing.assert_array_equal(learner.predict(x, "int8")[0], before)


@pytest.mark.slow
def test_executorch_refuses_trained_weights(tmp_path: Path) -> None:
    """A ``.pte`` file holds its constants: int8 never answers with weights of the export."""
    pytest.importorskip("executorch")
    index = exported("conv", tmp_path / "out", "executorch", verified=False)[1]
    refuses_trained(open_bundle(index, "tier"))


def test_earlier_bundles_refuse_trained_weights(conv_index: BundleIndex) -> None:
    """In bundles of earlier versions the file holds all constants."""
    bundle = open_bundle(conv_index, "tier")
    model = onnx.load_model_from_string(bundle.graphs[INT8])
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            held = onnx.numpy_helper.from_array(bundle.constants[tensor.name], tensor.name)
            tensor.CopyFrom(held)
    graph = replace(bundle.manifest.graphs[INT8], constants=())
    manifest = replace(bundle.manifest, graphs={**bundle.manifest.graphs, INT8: graph})
    files = {**bundle.graphs, INT8: model.SerializeToString()}
    refuses_trained(replace(bundle, manifest=manifest, graphs=files))


# the comparison and its bound


def comparison(loss: float) -> Comparison:
    """Return a comparison with this loss."""
    figures = Figures(0.5, 1.0, 1.0)
    return Comparison("accuracy", figures, replace(figures, score=0.5 - loss), loss)


def test_bound() -> None:
    """A loss equal to the bound or below passes, a larger one does not, and a gain passes."""
    data = examples(4)
    for loss in (0.01, 0.0, -0.3):
        LossCheck(data).judge("tier", comparison(loss))
    above = float(np.nextafter(0.01, 1))
    with pytest.raises(ExportError, match=r"'tier'.*0\.5 in float32.*0\.49 in int8.*--allow-loss"):
        LossCheck(data).judge("tier", comparison(above))
    LossCheck(data, allow_loss=True).judge("tier", comparison(above))
    LossCheck(data, max_loss=0.0).judge("tier", comparison(0.0))
    for wrong in (-0.01, float("nan")):
        with pytest.raises(ExportError, match="must be 0 or more"):
            LossCheck(data, max_loss=wrong)


def unlike(bundle: Bundle, rows: int = 3000) -> Examples:
    """Return 100 examples with float32's answers as labels; int8 differs in exactly one."""
    learner = Learner(bundle.manifest, load_runtime(bundle))
    x = texts(rows, seed=3).numpy()
    answers = {p: learner.predict(x, p)[0][0].argmax(1) for p in PRECISIONS}
    same = answers["float32"] == answers["int8"]
    assert not same.all()
    chosen = np.concatenate([np.flatnonzero(same)[:99], np.flatnonzero(~same)[:1]])
    return Examples(x[chosen], answers["float32"][chosen])


@pytest.mark.slow
def test_accuracy_at_the_bound(tmp_path: Path) -> None:
    """One of a hundred examples is a loss of 0.01, which is exactly at the bound."""
    _, index, _ = exported("text", tmp_path / "out")
    bundle = open_bundle(index, "tier")
    data = unlike(bundle)
    found = compare(bundle.manifest, index.blobs().read, data)
    assert (found.measure, found.float32.score, found.int8.score) == ("accuracy", 1.0, 0.99)
    assert found.loss == 0.01
    assert found.int8.milliseconds > 0
    assert found.float32.milliseconds > 0
    exported("text", tmp_path / "again", int8=LossCheck(data))
    with pytest.raises(ExportError, match=r"a loss of 1\.00% where 0\.90%"):
        exported("text", tmp_path / "refused", int8=LossCheck(data, 0.009))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out"]


@pytest.mark.slow
def test_perplexity(tmp_path: Path) -> None:
    """Perplexity is e to the mean cross-entropy of labels that count; its loss is a ratio."""
    _, index, found = exported("tokens", tmp_path / "out", verified=False)
    bundle = open_bundle(index, "tier")
    learner = Learner(bundle.manifest, load_runtime(bundle))
    data = KINDS["tokens"].examples(20)
    perplexity: dict[Precision, float] = {}
    for precision in PRECISIONS:
        p = softmax(learner.predict(data.x, precision)[0]).mean(0)
        logs = [np.log(p[i, j, y]) for (i, j), y in np.ndenumerate(data.y) if y >= 0]
        perplexity[precision] = np.exp(-np.mean(logs))
    assert found.measure == "perplexity"
    assert found.float32.score == pytest.approx(perplexity["float32"], rel=1e-6)
    assert found.int8.score == pytest.approx(perplexity["int8"], rel=1e-6)
    want = perplexity["int8"] / perplexity["float32"] - 1
    assert found.loss == pytest.approx(want, abs=1e-6)
    assert found.loss != 0


def test_mistakes(tmp_path: Path) -> None:
    """Every error says what to do, and nothing is written."""
    out = tmp_path / "out"
    with pytest.raises(ExportError, match=r"tier 'tier' has the precision int8.*--data FILE\.npz"):
        exported("conv", out, int8=None)
    wrong = Examples(np.zeros((4, 3), np.float32), np.zeros(4, np.int64))
    with pytest.raises(DataError, match="x has shape"):
        exported("conv", out, int8=LossCheck(wrong))
    arguments = {"example": example(IMAGE), "classes": CLASSES}
    with pytest.raises(ExportError, match="unknown precision 'int4'; there are float32, int8"):
        export_bundles(build(), {"a": Tier(2, precision="int4")}, out, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_without_the_graph(bundles: BundleIndex) -> None:
    """A bundle that was exported without int8 gives an error that says so."""
    bundle = open_bundle(bundles, "small")
    learner = Learner(bundle.manifest, load_runtime(bundle))
    with pytest.raises(BundleError, match=r"tier 'small' has no graph 'predict_int8'; export"):
        learner.predict(example(IMAGE, 2).numpy(), "int8")


def test_device(conv_index: BundleIndex, tmp_path: Path) -> None:
    """A device answers with int8, alone and through the hub."""

    async def scenario() -> None:
        config = hub_config(tmp_path, conv_index)
        token = TokenFile(config.tokens).issue("device")
        bundle = open_bundle(conv_index, "tier")
        learner = Learner(bundle.manifest, load_runtime(bundle))
        x = examples(6).x
        async with (
            running_hub(config) as (_, url),
            await Device.connect(url, token=token, tier="tier", cache=tmp_path / "cache") as device,
        ):
            alone = await device.predict(x, confidence=0, precision="int8")
            want = softmax(learner.predict(x, "int8")[0]).mean(0)
            np.testing.assert_allclose(alone.probabilities, want)
            assert not alone.by_hub.any()
            helped = await device.predict(x, confidence=2, precision="int8")
            assert helped.by_hub.all()
            exact = await device.predict(x, confidence=2)
            np.testing.assert_allclose(helped.probabilities, exact.probabilities, atol=0.05)

    asyncio.run(scenario())


# the command


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command takes weights and data and prints figures; without data it asks for them."""
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(
        "classes = 10\ninput_shape = [6]\n[tiers.big]\ncut = 2\n"
        '[tiers.small]\ncut = 1\nprecision = "int8"\n'
    )
    path = "tests.lib.models:token_model"
    model = token_model(seed=4)
    model.add_heads([1, 2], example(FEATURES), CLASSES)
    model.save(tmp_path / "trained.safetensors")
    save_npz(tmp_path / "data.npz", Examples(example(FEATURES, 50).numpy(), np.arange(50) % 10))
    arguments = ["export", path, "--tiers", str(tiers), "--out", str(tmp_path / "out")]
    assert "tier 'small' has the precision int8" in refusal(capsys, *arguments)
    assert not (tmp_path / "out").exists()
    arguments += ["--data", str(tmp_path / "data.npz"), "--max-loss", "0.5"]
    arguments += ["--weights", str(tmp_path / "trained.safetensors")]
    described = json.loads(output(capsys, *arguments, "--json"))
    assert "inference" not in described["big"]
    figures = described["small"]["inference"]
    assert figures["measure"] == "accuracy"
    assert figures["float32"].keys() == {"score", "kilobytes", "milliseconds"}
    saved = token_model()
    saved.load(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(t, saved.state_dict()[n]) for n, t in model.state_dict().items())
    shown = output(capsys, *arguments, "--overwrite")
    assert "inference in float32 and with int8 weights" in shown
