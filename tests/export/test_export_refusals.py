"""Modules that cannot be exported exactly are refused by name, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_sdk.bundle.index import INDEX, BundleIndex
from edge_sdk.bundle.store import BlobStore
from edge_sdk.protocol.tensors import Array
from export.bundles import writer
from export.bundles.writer import Tier, export_bundles
from export.cutting import checks as exact
from export.cutting.channels import Channels
from export.cutting.split_model import WEIGHTS, ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering import decompositions
from export.lowering import onnx as lower_onnx
from export.lowering.culprit import find_culprit
from export.lowering.graph_files import GraphFiles, lower
from export.lowering.verification.verify import Verifier
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.optimizers import check_hyper, get_optimizer
from export.steps.step import Step
from export.steps.train import train
from tests.lib.graph_runs import Run, run_of, verify
from tests.lib.models import (
    CLASSES,
    FEATURES,
    IMAGE,
    ConvBlock,
    MeanHead,
    conv_model,
    example,
    open_bundle,
)

WIDTH = 4


class Apply(nn.Module):
    """A Linear layer or a convolution, then a function."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, h: Tensor) -> Any:
        """Return the result of the function."""
        return self.function(self.layer(h))


def vectors(*blocks: nn.Module) -> SplitModel:
    """Return a model on (B, C) with these blocks and one more after the cut."""
    return SplitModel(
        nn.Linear(*FEATURES, WIDTH), [*blocks, nn.Identity()], nn.Linear(WIDTH, CLASSES)
    )


def images(*blocks: nn.Module, channels: Channels | None = None) -> SplitModel:
    """Return a model on (B, C, H, W) with these blocks and one more after the cut."""
    head = MeanHead(WIDTH, CLASSES)
    blocks = (*blocks, nn.Identity())
    return SplitModel(nn.Conv2d(IMAGE[0], WIDTH, 1), blocks, head, channels=channels)


def applied(function: Callable[[Tensor], Any]) -> SplitModel:
    """Return a model on vectors whose first block ends with a function."""
    return vectors(Apply(nn.Linear(WIDTH, WIDTH), function))


def export(model: SplitModel, out: Path, **changes: Any) -> BundleIndex:
    """Export one tier that is cut before the last block."""
    stem: Any = model.stem
    shape = IMAGE if isinstance(stem, nn.Conv2d) else FEATURES
    given = {"example": example(shape), "classes": CLASSES, **changes}
    tiers = given.pop("tiers", {"small": Tier(model.depth - 1)})
    return export_bundles(model, tiers, out, **given)


def refusal(model: SplitModel, folder: Path, **changes: Any) -> str:
    """Return the error of an export that must fail; it must leave no files behind."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(ExportError) as caught:
        export(model, folder / "out", **changes)
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export without graphs, in milliseconds, for tests that do not need them."""

    def nothing(runtime: str, steps: list[Step], *_: Any) -> GraphFiles:
        files = {step.name: step.name.encode() for step in steps}
        return GraphFiles(files, dict.fromkeys(files, ()))

    monkeypatch.setattr(writer, "lower", nothing)
    monkeypatch.setattr(writer, "trace", lambda step: None)
    monkeypatch.setattr(Verifier, "verify", lambda *_: None)


# Graphs that are wrong.


@pytest.fixture(scope="module")
def steps() -> ClientSteps:
    """The steps of the smallest tier of ``bundles``."""
    model = conv_model()
    model.add_heads([1], example(IMAGE), CLASSES)
    return steps_of(model)


def steps_of(model: SplitModel) -> ClientSteps:
    """Return the steps of a model cut after its first block."""
    segment = ClientSegment(model, 1)
    return ClientSteps(segment, get_optimizer("sgd"), get_codec("int8"), example(IMAGE), CLASSES)


@cache
def step_called(name: str, steps: ClientSteps) -> Step:
    """Return a step by its name, the same in every test."""
    return next(step for step in all_steps(steps) if step.name == name)


@pytest.fixture(scope="module")
def run() -> Run:
    """A function that runs the graphs of these steps."""
    model = conv_model()
    model.add_heads([1], example(IMAGE), CLASSES)
    return run_of("onnx", all_steps(steps_of(model)))


def bend(name: str, change: Callable[[Array, Array], Array]) -> Callable[[Run], Run]:
    """Change one output, given its value and, for state, its value before the step."""

    def bent(run: Run) -> Run:
        def wrong(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
            outputs = run(step, feeds)
            before = feeds.get(name.removeprefix("next/"), np.zeros((), np.float32))
            return {**outputs, name: change(outputs[name], before)}

        return wrong

    return bent


def one_code_more(q: Array, _: Array) -> Array:
    """Return the codes with one of them off by two."""
    q = q.copy()
    q.flat[-1] += 2 if q.flat[-1] < 100 else -2
    return q


@pytest.mark.parametrize("name", ["train", "predict", "forward"])
def test_right_graphs_pass(steps: ClientSteps, run: Run, name: str) -> None:
    """The comparison, which the tests below break, passes for right graphs."""
    calls: list[int] = []

    def counted(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        calls.append(len(feeds["x"]))
        return run(step, feeds)

    verify(steps, step_called(name, steps), counted, example(IMAGE))
    assert {1, 3, 8} <= set(calls)


@pytest.mark.parametrize(
    ("graph", "name", "change", "message"),
    [
        ("train", "loss", lambda a, _: a * 1.003, "in loss by"),
        ("train", "correct", lambda a, _: a + 1, "in correct by"),
        (
            "train",
            "next/block.0.conv.weight",
            lambda a, old: a + 0.01 * (a - old),
            "in next/block.0.conv.weight of layer block.0 by",
        ),
        (
            "train",
            "next/aux.1.out.bias",
            lambda a, old: old,
            "in next/aux.1.out.bias of layer aux.1 by",
        ),
        (
            "train",
            "next/momentum/stem.weight",
            lambda a, _: a * 1.01,
            "in next/momentum/stem.weight of layer stem by",
        ),
        ("train", "h.q", one_code_more, "in h.q by"),
        ("train", "h.scale", lambda a, _: a * 1.05, "in h.scale by"),
        ("predict", "logits", lambda a, _: a * 1.005, "in logits by"),
        ("predict", "logits", lambda a, _: a * np.float32("nan"), "in logits by nan"),
        ("forward", "h.q", lambda a, _: a[::-1].copy(), "in h.q by"),
        ("forward", "h.scale", lambda a, _: a * np.float32("nan"), "in h.scale by nan"),
    ],
)
def test_a_wrong_output_is_caught(
    steps: ClientSteps,
    run: Run,
    graph: str,
    name: str,
    change: Callable[[Array, Array], Array],
    message: str,
) -> None:
    """An error of one percent in any one output is caught and named with its layer."""
    with pytest.raises(ExportError) as caught:
        verify(steps, step_called(graph, steps), bend(name, change)(run), example(IMAGE))
    assert f"the graph '{graph}' differs from eager PyTorch {message}" in str(caught.value)
    assert "nothing was written" in str(caught.value)


@pytest.fixture(scope="module")
def normed() -> tuple[ClientSteps, Run]:
    """Steps with two consecutive batch norms: the second one's means are zero up to rounding."""
    torch.manual_seed(0)
    norms = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH))
    model = images(norms)
    model.add_heads([1], example(IMAGE), CLASSES)
    steps = steps_of(model)
    return steps, run_of("onnx", [train(steps)])


@pytest.mark.parametrize(
    ("norm", "change"),
    [
        (0, lambda a, old: old + 1.1 * (a - old)),  # a momentum of 0.11 instead of 0.1
        (0, lambda a, old: old + 1.01 * (a - old)),
        (0, lambda a, old: np.roll(a, 1)),  # the mean of another channel
        (0, lambda a, old: np.full_like(a, a.mean())),  # the mean over the channels too
        (0, lambda a, old: old),
        (0, lambda a, old: -a),
        (1, lambda a, old: a + np.float32(1e-4)),
    ],
)
def test_a_wrong_running_mean_is_caught(
    normed: tuple[ClientSteps, Run], norm: int, change: Callable[[Array, Array], Array]
) -> None:
    """It is caught although a mean may have the rounding errors of its activations."""
    steps, run = normed
    name = f"next/block.0.{norm}.running_mean"
    with pytest.raises(ExportError, match=rf"in {re.escape(name)} by"):
        verify(steps, step_called("train", steps), bend(name, change)(run), example(IMAGE))


def test_a_running_mean_of_zero_may_be_rounded(normed: tuple[ClientSteps, Run]) -> None:
    """Activations with a deviation of one cancel in the mean, and their rounding errors remain."""
    steps, run = normed
    assert verify(steps, step_called("train", steps), run, example(IMAGE)).redraws == 0


def test_slots_that_are_ignored_are_caught(steps: ClientSteps, run: Run) -> None:
    """Momentum is zero in the first step, so a second step is compared."""

    def forgetful(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        slot = "momentum/block.0.norm.weight"
        return run(step, {**feeds, slot: np.zeros_like(feeds[slot])})

    with pytest.raises(ExportError, match=r"in next/block\.0\.norm\.weight of layer block\.0 by"):
        verify(steps, step_called("train", steps), forgetful, example(IMAGE))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_graph_that_is_wrong_for_one_batch_size(steps: ClientSteps, run: Run, rows: int) -> None:
    """The error names the batch size."""

    def wrong(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        outputs = run(step, feeds)
        return outputs if len(feeds["x"]) != rows else {**outputs, "logits": outputs["logits"] + 1}

    with pytest.raises(ExportError, match=rf"in logits by 1, .* \(batch {rows}, "):
        verify(steps, step_called("predict", steps), wrong, example(IMAGE))


def test_a_draw_with_a_loss_may_differ_twice(steps: ClientSteps, run: Run) -> None:
    """At the kink of a ReLU rounding changes a gradient; a comparison with other data decides."""
    for wrong_draws in (1, 2, 3):
        calls: list[int] = []

        def at_first(
            step: Step,
            feeds: dict[str, Array],
            calls: list[int] = calls,
            wrong: int = wrong_draws,
        ) -> dict[str, Array]:
            calls.append(len(feeds["x"]))
            outputs = run(step, feeds)
            return {**outputs, "loss": outputs["loss"] + 1} if len(calls) <= wrong else outputs

        if wrong_draws > 2:
            with pytest.raises(ExportError, match="in loss by 1"):
                verify(steps, step_called("train", steps), at_first, example(IMAGE))
            continue
        assert (
            verify(steps, step_called("train", steps), at_first, example(IMAGE)).redraws
            == wrong_draws
        )
        assert len(calls) == 6 + wrong_draws  # three draws with one thread and with two


def test_a_draw_without_a_loss_may_not_differ(steps: ClientSteps, run: Run) -> None:
    """Predictions have no kinks."""
    calls: list[int] = []

    def once(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        calls.append(1)
        outputs = run(step, feeds)
        return {**outputs, "logits": outputs["logits"] + 1} if len(calls) == 1 else outputs

    with pytest.raises(ExportError, match="in logits by 1"):
        verify(steps, step_called("predict", steps), once, example(IMAGE))


def test_a_graph_that_does_not_run(steps: ClientSteps, run: Run) -> None:
    """Any exception of the runtime becomes an ExportError."""

    def broken(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        if len(feeds["x"]) == 3:
            raise RuntimeError("no kernel\nfor this")
        return run(step, feeds)

    with pytest.raises(ExportError, match=r"'predict' fails for batch 3.* \(no kernel\)"):
        verify(steps, step_called("predict", steps), broken, example(IMAGE))


def test_a_wrong_gradient_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong decomposition, the error names a tensor and its layer."""
    right = decompositions.convolution_backward

    def wrong(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_x, grad_weight, grad_bias = right(*args)
        return grad_x, None if grad_weight is None else grad_weight.flip(-1), grad_bias

    monkeypatch.setattr(decompositions, "convolution_backward", wrong)
    message = refusal(images(ConvBlock(WIDTH)), tmp_path / "folder")
    assert "the graph 'train' differs from eager PyTorch in next/block.0.conv.weight" in message
    assert "of layer block.0" in message


def test_random_numbers_are_caught(tmp_path: Path) -> None:
    """A layer whose answers differ from run to run in evaluation is refused by name."""
    message = refusal(applied(lambda h: h + torch.rand_like(h)), tmp_path / "folder")
    assert "block.0 is a Apply: it draws random numbers with aten.rand_like, which" in message
    assert "dropout, torch.rand, uniform_, bernoulli or randn" in message


# Modules that are refused by name.


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.SyncBatchNorm(WIDTH), "block.1.inner is a SyncBatchNorm: a device has no group"),
        (nn.FeatureAlphaDropout(0.5), "block.1.inner is a FeatureAlphaDropout: there is no exact"),
        (
            nn.GRU(WIDTH, WIDTH, 2, dropout=0.5),
            "block.1.inner is a GRU with dropout between its layers, which has random numbers",
        ),
        (
            nn.BatchNorm2d(WIDTH, momentum=None),
            "block.1.inner is a BatchNorm2d with momentum=None: a cumulative average needs a count",
        ),
    ],
)
def test_modules_without_an_exact_translation(
    tmp_path: Path, module: nn.Module, message: str
) -> None:
    """Before anything is traced, the error names the module's path and a replacement."""
    block = nn.Sequential()
    block.add_module("inner", module)
    found = refusal(images(nn.Identity(), block), tmp_path / "folder")
    assert message in found
    assert re.search(r"; (use|give) ", found), "says what to use instead"


def test_every_listed_module_has_a_replacement() -> None:
    """Every listed module has a reason and a replacement."""
    for kind, why in exact.REPLACEMENTS.items():
        assert "; use " in why, kind


class Last(nn.Module):
    """A recurrent layer over the rows of an image; it returns its last output as an image."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rows = kind(8, 8, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        """Activations (B, C, 8, 8) of the same shape."""
        rows, _ = self.rows(h.flatten(0, 1))
        return rows.reshape(h.shape)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(WIDTH),
        # these add no statistics and no seed; the operator matrix has their exactness
        pytest.param(nn.MaxPool2d(2), marks=pytest.mark.slow),
        pytest.param(nn.AvgPool2d(2), marks=pytest.mark.slow),
        pytest.param(nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2), marks=pytest.mark.slow),
        Last(nn.LSTM),
        pytest.param(Last(nn.GRU), marks=pytest.mark.slow),
        nn.Dropout(0.1),
        nn.Dropout2d(0.5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_with_an_exact_translation(tmp_path: Path, module: nn.Module) -> None:
    """Statistics, pools, recurrent layers and dropout are exported and equal eager PyTorch."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), module, nn.GELU())
    # a recurrent layer over the rows of an image reads the last axis
    channels: Channels | None = "first" if isinstance(module, Last) else None
    index = export(images(block, channels=channels), tmp_path / "out")
    manifest = index.manifest("small")
    statistics = [e.spec.name for e in manifest.state if e.kind == "statistic"]
    norms = isinstance(module, nn.BatchNorm2d)
    assert statistics == (["block.0.1.running_mean", "block.0.1.running_var"] if norms else [])
    seeds = [p.spec.name for p in manifest.graphs["train"].inputs if p.role == "seed"]
    assert seeds == (["seed"] if isinstance(module, nn.Dropout | nn.Dropout2d) else [])


def test_exporting_leaves_statistics_and_modes_alone(tmp_path: Path) -> None:
    """The export runs the model without training it; every tier starts from the same state."""
    torch.manual_seed(0)
    normed = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.GELU())
    model = images(normed, nn.Dropout(0.5), nn.Identity())
    model.block[1].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    index = export(model, tmp_path / "out", tiers={"a": Tier(1), "b": Tier(2)})
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.training
    assert not model.block[1].training
    for tier in index.tiers:
        initial = open_bundle(index, tier).initial_state
        assert initial["block.0.0.running_mean"].tolist() == [0.0] * WIDTH


def test_the_hubs_side_may_be_anything() -> None:
    """Modules that no tier holds are not checked."""
    model = images(nn.Identity(), nn.FeatureAlphaDropout())
    exact.check_stages(model, 1, example(IMAGE))
    with pytest.raises(ExportError, match=r"block\.1 is a FeatureAlphaDropout"):
        exact.check_stages(model, 2, example(IMAGE))


class Counter(nn.Module):
    """Keeps state between calls that is not a statistic of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations plus a number that grows with every call."""
        self.calls += 1
        return h + self.calls


def test_state_beside_the_parameters(tmp_path: Path) -> None:
    """A device has parameters and statistics, and no other state."""
    model = images(nn.Sequential(nn.BatchNorm2d(WIDTH), Counter()))
    message = refusal(model, tmp_path / "folder")
    assert message.startswith("block.0.1.calls changes when the model is called")
    assert "make it a parameter" in message
    assert model.block[0][1].calls == 0
    assert not model.block[0][0].running_mean.any()


class Unused(nn.Module):
    """Has a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(2))

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations unchanged."""
        return h


def frozen() -> nn.Module:
    """Return a layer whose bias is not trained."""
    layer = nn.Linear(WIDTH, WIDTH)
    layer.bias.requires_grad_(False)
    return layer


def tied() -> nn.Module:
    """Return two layers with one weight."""
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    layers[1].weight = layers[0].weight
    return layers


class Double(nn.Module):
    """Scales in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        """Return single precision."""
        return (h * self.scale).float()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Unused(), "block.0.spare does not affect the segment's logits; remove it, or freeze"),
        (Double(), "block.0.scale is torch.float64; parameters must be float32"),
    ],
)
def test_parameters_that_cannot_be_trained(tmp_path: Path, block: nn.Module, message: str) -> None:
    """The error names the parameter before anything is traced."""
    assert message in refusal(vectors(block), tmp_path / "folder")


def test_frozen_and_shared_parameters(tmp_path: Path) -> None:
    """Frozen parameters are not in the state; shared ones are in it once, with both gradients."""
    unused = Unused().requires_grad_(False)
    index = export(vectors(nn.Sequential(frozen(), tied(), unused)), tmp_path / "out")
    names = {s.name for s in index.manifest("small").exchanged() if s.name.startswith("block")}
    assert names == {
        "block.0.0.weight", "block.0.1.0.weight", "block.0.1.0.bias", "block.0.1.1.bias"
    }  # fmt: skip


# Modules that fail while they are called, traced or translated.


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: h.reshape(7, -1), "block.0 is a Apply and fails on a batch of 8: shape"),
        (lambda h: h.view(8, WIDTH), "block.0 is a Apply and fails on a batch of 1: shape"),
        (
            lambda h: h + torch.ones(8, 1),
            "block.0 is a Apply and returns torch.float32 [8, 4] for a batch of 1; it must return "
            "one float32 tensor of shape [1, ...]",
        ),
        (lambda h: h.reshape(2, -1), "returns torch.float32 [2, 16] for a batch of 8"),
        (lambda h: (h, h), "block.0 is a Apply and returns tuple for a batch of 8"),
        (lambda h: h.double(), "block.0 is a Apply and returns torch.float64 [8, 4]"),
        (lambda h: h[:, None, None, None], "activations of shape [8, 1, 1, 1, 4] at a cut"),
    ],
)
def test_stages_that_do_not_fit(
    tmp_path: Path, function: Callable[[Tensor], Any], message: str
) -> None:
    """A fixed batch size is refused, and so are other functions that do not map rows to rows."""
    assert message in refusal(applied(function), tmp_path / "folder")


def test_a_fixed_batch_size_says_what_to_write(tmp_path: Path) -> None:
    """The error says how to correct the code."""
    message = refusal(applied(lambda h: h.view(8, WIDTH)), tmp_path / "folder")
    assert message.endswith("it must take any batch: use x.shape[0] in place of a number")


def test_the_innermost_module_that_fails_is_named(tmp_path: Path) -> None:
    """The error does not name the block around it."""
    block = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(WIDTH + 1, WIDTH), nn.ReLU()))
    message = refusal(vectors(block), tmp_path / "folder")
    assert message.startswith("block.0.1.0 is a Linear and fails on a batch of 8: mat1 and mat2")


def test_a_batch_size_that_is_fixed_while_tracing(tmp_path: Path) -> None:
    """A graph would keep the plain number that ``len`` returns."""
    message = refusal(applied(lambda h: h.reshape(len(h), -1)), tmp_path / "folder")
    assert message.startswith("block.0 is a Apply: it fixes the batch size; use x.shape[0]")


class RunningMaximum(nn.Module):
    """The largest value so far along a row."""

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        return h.cummax(3)[0]


def test_an_operator_without_translation(tmp_path: Path) -> None:
    """The error names the module's path and the operator, and says what to do."""
    block = nn.Sequential(nn.ReLU())
    block.add_module("running", RunningMaximum())
    message = refusal(images(nn.Identity(), block), tmp_path / "folder")
    assert message.startswith(
        "block.1.running is a RunningMaximum: no ONNX translation for its training step "
        "(aten.cummax has none); replace it by "
    )


def decide(h: Tensor) -> Tensor:
    """Return a result that depends on a condition on the data."""
    return h if h.sum() > 0 else -h


def test_code_that_cannot_be_traced(tmp_path: Path) -> None:
    """An exception during tracing becomes an ExportError about the module with that code."""
    message = refusal(applied(decide), tmp_path / "folder")
    assert message.startswith("block.0 is a Apply: no ONNX translation for its training step (")
    assert "data-dependent" in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a\nb"),
        KeyError("a"),
        AssertionError("a"),
        NotImplementedError("a"),
        torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.INVALID_INPUT, "a"),
    ],
)
def test_any_error_while_lowering_is_an_export_error(
    steps: ClientSteps, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An error of any type becomes an ExportError of one line, with the original as its cause."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(lower_onnx, "trace", fail)
    with pytest.raises(ExportError, match=r"no ONNX translation .* \('?a'?\); replace") as caught:
        lower_onnx.traced(train(steps))
    assert caught.value.__cause__ is error


def segment_of(model: SplitModel) -> tuple[ClientSegment, Tensor]:
    """Return the segment before the last block, and an example."""
    x = example(IMAGE if isinstance(model.stem, nn.Conv2d) else FEATURES)
    model.add_heads([model.depth - 1], x, CLASSES)
    return ClientSegment(model, model.depth - 1), x


def test_nobody_is_to_blame() -> None:
    """Every module of an exportable segment can be lowered alone."""
    segment, x = segment_of(vectors(nn.Sequential(nn.Identity(), nn.GELU())))
    assert (
        find_culprit(segment, x, lambda step: lower("onnx", [step], {}), ExportError("a")) is None
    )


def test_the_first_to_fail_is_to_blame() -> None:
    """Leaves are checked before their parents; modules that are not called are left out."""
    block = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.GELU())
    segment, x = segment_of(vectors(nn.Tanh(), block))

    def culprit(number: int) -> str | None:
        """Return the module that is named when the lowering of one step fails."""
        steps: list[Step] = []

        def lower(step: Step) -> bytes:
            steps.append(step)
            if len(steps) == number:
                raise ExportError("for a test")
            return b""

        return find_culprit(segment, x, lower, ExportError("of the step"))

    found = [culprit(number) for number in range(1, 7)]
    names = [
        *("stem is a Linear", "block.0 is a Tanh", "block.1.0 is a ReLU"),
        *("block.1.1 is a Linear", "block.1.2 is a GELU"),
    ]
    assert found[:5] == [f"{name}: for a test" for name in names]


@pytest.mark.parametrize(
    ("before", "fault", "message"),
    [
        (nn.BatchNorm3d(WIDTH), nn.MaxPool3d(2), "aten.max_pool3d_with_indices_backward has none"),
        (nn.Dropout3d(0.5), nn.AdaptiveMaxPool3d(1), "aten.adaptive_max_pool3d has none"),
        (nn.InstanceNorm3d(WIDTH), nn.MaxPool3d(2), "aten.max_pool3d_with_indices_backward"),
    ],
)
def test_the_culprit_is_named_with_its_own_reason(
    tmp_path: Path, before: nn.Module, fault: nn.Module, message: str
) -> None:
    """A module beside it that is exact in the whole step is not blamed."""
    block = nn.Sequential(
        nn.Unflatten(1, (WIDTH, 2, 2, 2)), before, fault, nn.Flatten(), nn.LazyLinear(WIDTH)
    )
    block(torch.zeros(2, WIDTH * 8))
    model = vectors(nn.Sequential(nn.Linear(WIDTH, WIDTH * 8), block))
    said = refusal(model, tmp_path / "folder")
    name = f"block.0.1.2 is a {type(fault).__name__}: no ONNX translation for its training step ("
    assert said.startswith(name)
    assert message in said


def test_of_two_faults_the_one_that_stopped_the_step_is_named() -> None:
    """A module may fail alone for another reason, which is not the step's."""
    segment, x = segment_of(vectors(nn.Sequential(nn.Tanh(), nn.GELU())))
    reasons = iter(["", "another", "", "the step's"])

    def lower(step: Step) -> bytes:
        if reason := next(reasons):
            raise ExportError(reason)
        return b""

    found = find_culprit(segment, x, lower, ExportError("the step's"))
    assert found == "block.0 is a Sequential: the step's"


def test_without_a_culprit_the_graph_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_graphs: None
) -> None:
    """The error still gives the reason."""

    def fail(*_: Any) -> GraphFiles:
        raise ExportError("no ONNX translation for its training step (mystery)")

    monkeypatch.setattr(writer, "lower", fail)
    monkeypatch.setattr(writer, "find_culprit", lambda *_: None)
    message = refusal(vectors(nn.ReLU()), tmp_path / "folder")
    assert message == "the training step: no ONNX translation for its training step (mystery)"


def test_hooks_are_removed() -> None:
    """The search for a culprit does not change the model."""
    model = vectors(nn.Sequential(nn.ReLU()))
    exact.check_stages(model, 1, example(FEATURES))
    with pytest.raises(ExportError):
        exact.check_stages(applied(lambda h: h.view(8, WIDTH)), 1, example(FEATURES))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# Settings that make no sense.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiers": {}}, "there are no tiers"),
        (
            {"tiers": {"a": Tier(0)}},
            "cut 0 is outside the model: it has 4 blocks, so a cut is from",
        ),
        ({"tiers": {"a": Tier(1), "b": Tier(4)}}, "cut 4 is outside the model"),
        ({"tiers": {"a": Tier(1, "zip")}}, "unknown codec 'zip'; there are int8, fp16"),
        ({"optimizer": "lbfgs"}, "unknown optimizer 'lbfgs'; there are sgd, adamw"),
        ({"example": example(IMAGE, rows=1)}, "the example needs at least 2 rows"),
        ({"example": example(IMAGE).double()}, "the example is torch.float64; inputs are one of"),
        ({"example": example((2, 8, 8))}, "stem is a Conv2d and fails on a batch of 8: Given"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The error is raised before any work."""
    assert message in refusal(conv_model(), tmp_path / "folder", **changes)


def test_unknown_hyper_parameters() -> None:
    """The error lists the hyper-parameters of the optimizer."""
    assert check_hyper("sgd", {"lr": 1.0})["lr"] == 1.0
    with pytest.raises(ExportError, match=r"sgd has no hyper-parameter 'eps'; it has lr, momentum"):
        check_hyper("sgd", {"eps": 1e-8})


# Folders.


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (writer, "lower"),
        (Verifier, "verify"),
        (writer, "ClientSteps"),
        (BlobStore, "write"),
        (SplitModel, "save"),
        (Path, "chmod"),
        (Path, "rename"),
    ],
)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path,
    no_graphs: None,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    error: BaseException,
) -> None:
    """A failure at any point, with any exception, leaves no folder and no other files."""
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        patch.setattr(place, name, fail)
        with pytest.raises(type(error)):
            export(vectors(nn.ReLU()), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    export(vectors(nn.ReLU()), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_in_the_second_tier(
    tmp_path: Path, no_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundles of the first tier are not left behind."""

    def fail_later(verifier: Verifier, *_: Any) -> None:
        if verifier.steps.segment.cut == 2:
            raise ExportError("differs")

    monkeypatch.setattr(Verifier, "verify", fail_later)
    tiers = {"small": Tier(1), "medium": Tier(2)}
    assert refusal(conv_model(), tmp_path / "folder", tiers=tiers) == "differs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_that_are_no_export_are_kept(
    tmp_path: Path, no_graphs: None, overwrite: bool
) -> None:
    """Such a folder is kept whatever its contents, also if overwriting is requested."""
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("a file")
    before = tree(tmp_path)
    for out in (folder, file):
        with pytest.raises(ExportError, match=r"exists; choose another folder"):
            export(vectors(nn.ReLU()), out, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_overwriting_an_earlier_export(tmp_path: Path, no_graphs: None) -> None:
    """An export is overwritten only on request; then no old file is left."""
    out = tmp_path / "out"
    export(vectors(nn.ReLU()), out, tiers={"old": Tier(1)})
    (out / "blobs" / "extra").write_bytes(b"x")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match=r"exists; choose another folder, or overwrite"):
        export(vectors(nn.ReLU()), out)
    assert tree(tmp_path) == before
    index = export(vectors(nn.ReLU()), out, tiers={"new": Tier(1, "fp16")}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(BundleIndex.read(out).tiers) == ["new"]
    blobs = {
        f"blobs/{name}" for name in (*index.manifest("new").blobs, index.tiers["new"].manifest)
    }
    assert set(tree(out)) == {INDEX, WEIGHTS, *blobs}


def test_a_failure_keeps_the_earlier_export(
    tmp_path: Path, no_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier export is replaced at the end, not at the beginning."""
    out = tmp_path / "out"
    export(vectors(nn.ReLU()), out)
    before = tree(tmp_path)

    def fail(*args: Any) -> None:
        raise ExportError("differs")

    monkeypatch.setattr(Verifier, "verify", fail)
    with pytest.raises(ExportError, match="differs"):
        export(vectors(nn.ReLU()), out, overwrite=True)
    assert tree(tmp_path) == before


def test_a_failure_while_replacing(
    tmp_path: Path, no_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure at the last moment restores the earlier export."""
    out = tmp_path / "out"
    export(vectors(nn.ReLU()), out)
    before = tree(tmp_path)
    rename, failed = Path.rename, []

    def fail_once(source: Path, target: Path) -> Path:
        if target == out and not failed:
            failed.append(source)
            raise OSError("disk full")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="disk full"):
        export(vectors(nn.ReLU()), out, overwrite=True)
    assert failed
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_written_to(tmp_path: Path, no_graphs: None) -> None:
    """An empty folder may exist already, and missing parents are created."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deeper"):
        export(vectors(nn.ReLU()), out)
        assert BundleIndex.read(out).classes == CLASSES
