"""The functional steps in PyTorch equal the same steps in ONNX Runtime."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.runtime.onnx import OnnxRuntime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import LocalPlan
from export.bundles.writer import Tier, export_bundles, make_steps
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName, lower
from export.steps.client_steps import ClientSteps
from export.steps.losses import local_loss
from export.steps.predict import predict
from export.steps.torch_runtime import TorchRuntime
from export.steps.train import train
from tests.lib.graph_runs import run_files, verify
from tests.lib.models import (
    CLASSES,
    IMAGE,
    TOKENS,
    MeanHead,
    TokenBlock,
    build_batchnorm,
    conv_model,
    example,
    open_bundle,
    text_model,
    token_model,
)

HYPER = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0},
    "adamw": {
        "lr": 0.01,
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "max_norm": 0.0,
    },
}
WORDS = 12


def words(rows: int, seed: int = 0) -> Tensor:
    """Return random integers for an embedding."""
    return torch.randint(WORDS, (rows, 5), generator=torch.Generator().manual_seed(seed))


class RecurrentBlock(nn.Module):
    """A residual LSTM, which oneDNN computes in eager mode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = h + self.lstm(h)[0]
        return result


def recurrent_model() -> SplitModel:
    """Return a model of two LSTMs for :data:`TOKENS`."""
    torch.manual_seed(0)
    blocks = [RecurrentBlock(6), RecurrentBlock(6)]
    return SplitModel(nn.Linear(TOKENS[1], 6), blocks, MeanHead(6, CLASSES))


def tied_model() -> SplitModel:
    """Return a model with a parameter of two names, in a module that is used twice."""
    torch.manual_seed(0)
    block = TokenBlock(8)
    other = TokenBlock(8)
    other.norm.weight = block.norm.weight
    return SplitModel(nn.Linear(TOKENS[1], 8), [block, block, other], MeanHead(8, CLASSES))


MODELS: dict[str, tuple[Callable[[], SplitModel], Callable[[int, int], Tensor]]] = {
    "conv": (conv_model, lambda rows, seed: example(IMAGE, rows, seed)),
    "batchnorm and dropout": (build_batchnorm, lambda rows, seed: example(IMAGE, rows, seed)),
    "vectors": (token_model, lambda rows, seed: example(TOKENS, rows, seed)),
    "words": (text_model, words),
    "recurrent": (recurrent_model, lambda rows, seed: example(TOKENS, rows, seed)),
}


def batch_of(x: Tensor, seed: int, optimizer: str, seeded: bool) -> dict[str, Array]:
    """Return the inputs of the graph ``train`` besides the state."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (len(x),), generator=generator).numpy()
    hyper = {name: np.asarray(value, np.float32) for name, value in HYPER[optimizer].items()}
    key = {"seed": np.asarray(1000 + seed)} if seeded else {}
    return {"x": x.numpy(), "y": y, **hyper, **key}


Both = Callable[..., tuple[OnnxRuntime, TorchRuntime, ClientSteps]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Gives the same tier of a kind in both runtimes, new ones each time; exports a kind once."""
    exported: dict[tuple[str, str], BundleIndex] = {}

    def give(kind: str, optimizer: str = "sgd") -> tuple[OnnxRuntime, TorchRuntime, ClientSteps]:
        build, draw = MODELS[kind]
        model, x = build(), draw(8, 0)
        cut = len(model.block) - 1
        tiers = {name: Tier(cut, "fp16", name) for name in ("onnx", "torch")}
        if (kind, optimizer) not in exported:
            exported[kind, optimizer] = export_bundles(
                build(), tiers, tmp_path_factory.mktemp("both") / "out", example=x,
                classes=CLASSES, optimizer=optimizer, verified=False,
            )  # fmt: skip
        index = exported[kind, optimizer]
        model.add_heads([cut], x, CLASSES)
        steps = make_steps(ClientSegment(model, cut), tiers["torch"], x, CLASSES, optimizer)
        torch_runtime = TorchRuntime(index.manifest("torch"), steps)
        return OnnxRuntime(open_bundle(index, "onnx")), torch_runtime, steps

    return give


def assert_close(got: dict[str, Array], want: dict[str, Array], tolerance: float = 1e-5) -> None:
    """Check that tensors are equal up to float32 rounding, and dtypes and shapes exactly."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        loose = 2e-3 if array.dtype == np.float16 else tolerance  # one unit in the last place
        np.testing.assert_allclose(got[name], array, rtol=loose, atol=loose, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        *(
            pytest.param(kind, "sgd", marks=pytest.mark.slow if kind == "words" else ())
            for kind in MODELS
        ),
        *(
            pytest.param(kind, "adamw", marks=() if kind == "words" else pytest.mark.slow)
            for kind in MODELS
        ),
    ],
)
def test_same_as_onnx(kind: str, optimizer: str, both: Both) -> None:
    """States, losses, answers and activations of six steps are equal, for several batch sizes."""
    _, draw = MODELS[kind]
    onnx, runtime, steps = both(kind, optimizer)
    assert_close(runtime.get_state(), onnx.get_state(), 0)
    initial = runtime.get_state()
    for step, rows in enumerate((8, 3, 8, 5, 4, 8)):
        x = draw(rows, step + 1)
        batch = batch_of(x, step, optimizer, steps.random_calls > 0)
        assert_close(runtime.run("train", batch), onnx.run("train", batch))
        assert_close(runtime.get_state(), onnx.get_state())
        for graph in ("predict", "forward"):
            assert_close(runtime.run(graph, {"x": x.numpy()}), onnx.run(graph, {"x": x.numpy()}))
    moved = [np.abs(runtime.get_state()[n] - t).max() for n, t in initial.items()]
    assert min(moved) > 1e-4


@given(
    heads=st.integers(1, 4),
    rows=st.integers(1, 5),
    positions=st.integers(0, 4),
    classes=st.integers(2, 7),
    distill=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_local_loss(
    heads: int, rows: int, positions: int, classes: int, distill: float, scale: float, seed: int
) -> None:
    """Cross-entropy and distillation equal their definitions, in float64 by autograd."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, positions) if positions else (rows,)
    logits = scale * torch.randn(heads, *shape, classes, generator=generator)
    y = torch.randint(-1 if positions else 0, classes, shape, generator=generator)
    y.view(-1)[0] = 0  # one label counts
    own_logits, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = local_loss(own_logits, y, distill)
    counted = y.reshape(-1) >= 0
    log_p = exact.reshape(heads, -1, classes)[:, counted].log_softmax(-1)
    labels = y.reshape(-1)[counted]
    want = -log_p[:, torch.arange(len(labels)), labels].mean(1).sum()
    for own in range(heads):
        others = [other for other in range(heads) if other != own]
        for other in others:
            target = log_p[other].detach()
            apart = (target.exp() * (target - log_p[own])).sum(1).mean()
            want = want + distill * apart / len(others)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, own_logits)
    (wanted,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        pytest.param("conv", "torch", marks=pytest.mark.slow),
        pytest.param("decoder", "onnx", marks=pytest.mark.slow),
        pytest.param("conv", "onnx", marks=pytest.mark.slow),
        pytest.param("decoder", "torch", marks=pytest.mark.slow),
        pytest.param("decoder", "executorch", marks=pytest.mark.slow),
    ],
)
def test_distillation_is_exported(kind: str, runtime: RuntimeName) -> None:
    """The export is verified with three heads, also with labels that do not count."""
    model, x, classes = distilled(kind)
    tier = Tier(3, "fp16", runtime, 8, distill=2.0)
    steps = make_steps(ClientSegment(model, 3), tier, x, classes, "sgd")
    step = train(steps)
    lowered = lower(runtime, [step], {})
    verify(steps, step, run_files(runtime, lowered), x)
    other = make_steps(steps.segment, replace(tier, distill=1.9), x, classes, "sgd")
    run = run_files(runtime, lowered)
    with pytest.raises(ExportError, match="'train' differs from eager PyTorch in "):
        verify(other, train(other), lambda _, feeds: run(step, feeds), x)


def distilled(kind: str) -> tuple[SplitModel, Tensor, int]:
    """Return a model whose three heads disagree, an input, and the number of classes."""
    torch.manual_seed(0)
    model, x, classes = conv_model(), example(IMAGE), CLASSES
    if kind == "decoder":
        blocks = [*text_model(words=WORDS).block, TokenBlock(8)]
        model = SplitModel(WordStem(), blocks, nn.Linear(8, WORDS), "tokens")
        x, classes = words(8), WORDS
    model.add_heads([1, 2, 3], x, classes)
    with torch.no_grad():
        for parameter in model.aux.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model, x, classes


class WordStem(nn.Module):
    """An embedding with the name that a model of tokens needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors of the words."""
        result: Tensor = self.embedding(x)
        return result


@pytest.mark.slow
def test_no_distillation_no_operators() -> None:
    """With weight zero or a single head, the graph has no operators for distillation."""
    model, x, classes = distilled("conv")
    graphs = {}
    for name, cut, distill in (("none", 3, None), ("zero", 3, 0.0), ("some", 3, 0.5)):
        tier = Tier(cut) if distill is None else Tier(cut, distill=distill)
        steps = make_steps(ClientSegment(model, cut), tier, x, classes, "sgd")
        graphs[name] = lower("onnx", [train(steps)], {}).files["train"]
    assert graphs["none"] == graphs["zero"] != graphs["some"]
    single = conv_model()
    single.add_heads([1], x, classes)
    segment = ClientSegment(single, 1)
    both = [
        lower("onnx", [train(make_steps(segment, tier, x, classes, "sgd"))], {}).files["train"]
        for tier in (Tier(1), Tier(1, distill=0.5))
    ]
    assert both[0] == both[1]
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ExportError, match="the weight must be 0 or more"):
            make_steps(segment, Tier(1, distill=wrong), x, classes, "sgd")


def test_momentum_of_zero(both: Both) -> None:
    """Without momentum and weight decay the step is plain gradient descent, as in ONNX."""
    onnx, runtime, _ = both("conv")
    hyper = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
    plain = {name: np.asarray(value, np.float32) for name, value in hyper.items()}
    for step in range(3):
        batch = batch_of(example(IMAGE, 8, step), step, "sgd", False) | plain
        assert_close(runtime.run("train", batch), onnx.run("train", batch))
        assert_close(runtime.get_state(), onnx.get_state())


def test_devices_share_a_module(both: Both) -> None:
    """Interleaved devices in threads give the results of single ones; the module stays."""
    _, first, steps = both("batchnorm and dropout")
    segment = steps.segment
    segment.stem.eval()
    modes = [module.training for module in segment.modules()]
    tensors = dict(segment.state_dict(keep_vars=True))
    values = {n: t.detach().clone() for n, t in tensors.items()}
    runtimes = [first, *(TorchRuntime(first.manifest, steps) for _ in range(3))]

    def train(runtime: TorchRuntime, device: int) -> None:
        for step in range(6):
            seed = 100 * device + step
            runtime.run("train", batch_of(example(IMAGE, 4, seed), seed, "sgd", True))
            runtime.run("predict", {"x": example(IMAGE, 2, seed).numpy()})

    threads = [
        threading.Thread(target=train, args=(runtime, device))
        for device, runtime in enumerate(runtimes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device, runtime in enumerate(runtimes):
        alone = TorchRuntime(first.manifest, steps)
        train(alone, device)
        assert_close(runtime.get_state(), alone.get_state(), 0)
    assert modes == [module.training for module in segment.modules()]
    for name, tensor in segment.state_dict(keep_vars=True).items():
        assert tensor is tensors[name], name
        assert torch.equal(tensor, values[name]), name
        assert tensor.grad is None


def test_tied_tensors_and_modules() -> None:
    """A tensor with two names and a module with two places are one in a step, as in the module."""
    model = tied_model()
    x = example(TOKENS)
    model.add_heads([2], x, CLASSES)
    segment = ClientSegment(model, 2)
    before = dict(segment.state_dict(keep_vars=True))
    steps = make_steps(segment, Tier(2), x, CLASSES, "sgd")
    doubled = {n: 2 * t for n, t in steps.initial.items()}
    logits = predict(steps).function(dict(steps.constants), {**doubled, "x": x})["logits"]
    reference = copy.deepcopy(segment)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(2)
        want = reference(x)[1]
    torch.testing.assert_close(logits, want)
    assert all(t is before[n] for n, t in segment.state_dict(keep_vars=True).items())


def test_state(both: Both) -> None:
    """States are copied in and out, slots start at zero, and a wrong state is refused."""
    onnx, runtime, _ = both("conv")
    batch = batch_of(example(IMAGE), 0, "sgd", False)
    initial = runtime.get_state()
    for state in runtime.get_state(), initial:
        runtime.set_state(state)
        for array in state.values() if state is not initial else ():
            array[...] = 7
    for _ in range(2):
        runtime.set_state(initial)
        runtime.run("train", batch)
    onnx.run("train", batch)
    assert_close(runtime.get_state(), onnx.get_state())
    assert_close(TorchRuntime(runtime.manifest, make()).get_state(), initial, 0)
    with pytest.raises(BundleError, match=r"stem\.bias is missing, must be \(6,\)"):
        runtime.set_state({n: a for n, a in initial.items() if n != "stem.bias"})
    with pytest.raises(BundleError, match=r"stem\.bias has shape \(5,\), must be \(6,\)"):
        runtime.set_state(initial | {"stem.bias": np.zeros(5, np.float32)})


def make() -> ClientSteps:
    """Build the steps of the same tier from the same model again."""
    model = conv_model()
    model.add_heads([3], example(IMAGE), CLASSES)
    return make_steps(
        ClientSegment(model, 3), Tier(3, "fp16", "torch"), example(IMAGE), CLASSES, "sgd"
    )


def test_refusals(both: Both) -> None:
    """Missing or wrong inputs and unknown graphs are refused, and the state does not change."""
    _, runtime, steps = both("words")
    batch = batch_of(words(4), 0, "sgd", False)
    before = runtime.get_state()
    with pytest.raises(DataError, match="the graph 'train' needs the input 'y'"):
        runtime.run("train", {n: a for n, a in batch.items() if n != "y"})
    with pytest.raises(DataError, match=r"x is float64 \[4, 5\], must be int64"):
        runtime.run("train", batch | {"x": batch["x"].astype(np.float64)})
    with pytest.raises(DataError, match=r"y is int64 \[4, 1\]"):
        runtime.run("train", batch | {"y": batch["y"][:, None]})
    with pytest.raises(BundleError, match="cannot run the graph 'train'"):
        runtime.run("train", batch | {"x": batch["x"] + WORDS})
    with pytest.raises(BundleError, match="no graph 'backward'"):
        runtime.run("backward", batch)
    assert_close(runtime.get_state(), before, 0)
    other = make_steps(steps.segment, Tier(2, "int8", "torch"), words(8), CLASSES, "sgd")
    with pytest.raises(BundleError, match="is not of these steps"):
        TorchRuntime(runtime.manifest, other)


def test_export(tmp_path: Path) -> None:
    """The export is verified; a device's SDK refuses such a bundle, and int8 is refused."""
    lines: list[str] = []
    index = export_bundles(
        conv_model(), {"t": Tier(1, runtime="torch")}, tmp_path / "out", example=example(IMAGE),
        classes=CLASSES, progress=lines.append,
    )  # fmt: skip
    assert "t: cut 1, checking train against PyTorch" in lines
    bundle = open_bundle(index, "t")
    assert bundle.graphs["train"] == b"cutlayer step train\n"
    assert sum(bundle.manifest.blobs.values()) < 8000
    with pytest.raises(BundleError, match="for the runtime 'torch'"):
        load_runtime(bundle)
    with pytest.raises(ExportError, match="precision int8"):
        export_bundles(
            conv_model(), {"t": Tier(1, runtime="torch", precision="int8")}, tmp_path / "other",
            example=example(IMAGE), classes=CLASSES,
        )  # fmt: skip


def test_learner(both: Both) -> None:
    """A whole local round gives the result of ONNX Runtime."""
    onnx, runtime, _ = both("batchnorm and dropout")
    y = torch.randint(CLASSES, (22,), generator=torch.Generator().manual_seed(1)).numpy()
    data = Examples(example(IMAGE, 22, 5).numpy(), y)
    plan = LocalPlan(2, 8, HYPER["sgd"], "train", seed=3)
    results = [
        Learner(r.manifest, r).train(r.get_state(), data, plan, lambda *_: None)
        for r in (onnx, runtime)
    ]
    assert_close(results[1].state, results[0].state)
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-5)
