"""Exported graphs in the device's runtime, against eager PyTorch in float64.

The reference calls the modules itself and computes the loss by its definition; autograd and
``torch.optim`` do the rest. It shares no code with the exporter.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle, Graph, Manifest
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.tensors import Array, TensorSpec, check_tensors
from edge_sdk.runtime import load_runtime
from edge_sdk.runtime.onnx import OnnxRuntime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import LocalPlan
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import ClientSegment, SplitModel
from export.lowering.graph_files import lower as lower_all
from export.lowering.onnx import lower, traced
from export.packing.codecs import Codec, Shape, get_codec
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.optimizers import get_optimizer
from export.steps.train import train
from export.tensor_names import layer_of
from tests.lib.decay import optimizer_of
from tests.lib.graph_runs import run_files, verify
from tests.lib.models import (
    CLASSES,
    FEATURES,
    IMAGE,
    conv_model,
    example,
    open_bundle,
    text_model,
    token_model,
)

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0}
ADAMW = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "max_norm": 0.0}
STILL = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
"""Hyper-parameters of a step that changes nothing, so that every batch has the same parameters."""

BATCHES = (8, 1, 3, 5)
WORDS = 12
CUTS = {"small": 1, "medium": 2, "large": 3}


class Reference:
    """The steps of a device by definition."""

    def __init__(self, model: SplitModel, cut: int, hyper: dict[str, float]) -> None:
        self.model, self.cut = copy.deepcopy(model).double(), cut
        held = ["stem", *(f"block.{i}" for i in range(cut)), *(f"aux.{i + 1}" for i in range(cut))]
        self.parameters = {n: p for n, p in self.model.named_parameters() if layer_of(n) in held}
        self.initial = {n: p.detach().clone() for n, p in self.parameters.items()}
        given = list(self.parameters.values())
        self.optimizer = optimizer_of(self.model, hyper, given)

    def answers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activations at the cut and the logits (heads, batch, classes)."""
        h = self.model.stem(x.double() if x.is_floating_point() else x)
        logits = []
        for depth in range(1, self.cut + 1):
            h = self.model.block[depth - 1](h)
            if str(depth) in self.model.aux:
                logits.append(self.model.aux[str(depth)](h))
        return h, torch.stack(logits)

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the number of right answers, and the activations."""
        h, logits = self.answers(x)
        rows = torch.arange(len(y))
        loss = torch.zeros((), dtype=torch.float64)
        for head in logits:
            loss = loss + (head.logsumexp(1) - head[rows, y]).sum() / len(y)
        mean = torch.stack([head.softmax(1) for head in logits]).mean(0)
        return loss, (mean.argmax(1) == y).sum(), h.detach()

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float, Tensor]:
        """Update once; return the outputs of the step graph."""
        loss, correct, h = self.loss(x, y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item(), float(correct), h

    def assert_parameters(self, found: dict[str, Array]) -> None:
        """Check that every parameter equals the reference's, up to float32 rounding."""
        assert found.keys() == self.parameters.keys()
        for name, want in self.parameters.items():
            change = (want.detach() - self.initial[name]).abs().max().item()
            error = np.abs(found[name] - want.detach().numpy()).max()
            assert error <= 1e-3 * change + 2e-6, f"{name} is off by {error} after {change}"


def assert_packed(parts: dict[str, Array], h: Tensor) -> None:
    """Check that the packed parts are the activations, within the loss of the codec."""
    want = h.numpy()
    slack = 1e-5 * np.abs(want).max() + 1e-6
    if "h" in parts:
        assert parts["h"].dtype == np.float16
        assert (np.abs(parts["h"] - want) <= np.abs(want) * 2**-10 + slack).all()
        return
    scale = parts["h.scale"].astype(np.float64)
    # 8 x 8 positions are enough for a scale per channel of a row; else one per row
    channels = want.shape[1] if want.ndim == 4 and want[0, 0].size >= 32 else 1
    assert scale.shape == (len(want), channels, *[1] * (want.ndim - 2))
    assert parts["h.q"].dtype == np.int8
    assert (np.abs(parts["h.q"] * scale - want) <= scale * 0.501 + slack).all()


def labels(rows: int, seed: int) -> Tensor:
    """Return random labels."""
    return torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))


def scalars(hyper: dict[str, float]) -> dict[str, Array]:
    """Return hyper-parameters as a graph takes them."""
    return {name: np.asarray(value, np.float32) for name, value in hyper.items()}


def train_batch(x: Tensor, y: Tensor, hyper: dict[str, float]) -> dict[str, Array]:
    """Return the inputs of the training graph besides the state."""
    return {"x": x.numpy(), "y": y.numpy(), **scalars(hyper)}


def assert_trains(
    runtime: OnnxRuntime, reference: Reference, inputs: list[Tensor], hyper: dict[str, float]
) -> None:
    """Check loss, answers, activations and parameters over steps with several batch sizes."""
    for number, x in enumerate(inputs):
        y = labels(len(x), number)
        loss, correct, h = reference.step(x, y)
        outputs = runtime.run("train", train_batch(x, y, hyper))
        assert outputs.pop("loss") == pytest.approx(loss, rel=1e-4)
        assert outputs.pop("correct") == correct
        symbols: dict[str, int] = {}
        check_tensors(outputs, runtime.manifest.packed, symbols)
        assert symbols["batch"] == len(x)
        assert_packed(outputs, h)
        reference.assert_parameters(runtime.get_state())
    moved = [
        (p.detach() - reference.initial[n]).abs().max().item()
        for n, p in reference.parameters.items()
    ]
    assert min(moved) > 1e-4, "the comparison is empty for a parameter that does not change"


def assert_answers(runtime: OnnxRuntime, reference: Reference, inputs: list[Tensor]) -> None:
    """Check ``predict`` and ``forward`` with the reference's current parameters."""
    for x in inputs:
        with torch.no_grad():
            h, logits = reference.answers(x)
        outputs = runtime.run("predict", {"x": x.numpy()})
        np.testing.assert_allclose(outputs.pop("logits"), logits.numpy(), rtol=1e-4, atol=1e-4)
        assert_packed(outputs, h)
        packed = runtime.run("forward", {"x": x.numpy()})
        assert packed.keys() == outputs.keys()
        assert_packed(packed, h)


@pytest.mark.parametrize("tier", list(CUTS))
def test_sgd_on_images(bundles: BundleIndex, model: SplitModel, tier: str) -> None:
    """Convolutions and GroupNorm, one to three heads, int8 and fp16, batches down to one row."""
    runtime = OnnxRuntime(open_bundle(bundles, tier))
    reference = Reference(model, CUTS[tier], SGD)
    inputs = [example(IMAGE, rows, seed=10 + rows) for rows in BATCHES]
    assert_answers(runtime, reference, inputs)
    assert_trains(runtime, reference, inputs, SGD)
    assert_answers(runtime, reference, inputs)


def test_answers_are_the_mean_of_probabilities(bundles: BundleIndex, model: SplitModel) -> None:
    """The mean is over probabilities, not logits: the two differ when heads disagree."""
    with torch.no_grad():
        for depth, scale in (("1", 30.0), ("2", 3.0), ("3", 10.0)):
            model.aux[depth].out.weight.mul_(scale)
    reference = Reference(model, 3, STILL)
    x = example(IMAGE, 64, seed=1)
    with torch.no_grad():
        _, logits = reference.answers(x)
    answers = logits.softmax(-1).mean(0).argmax(-1)
    assert (answers != logits.mean(0).argmax(-1)).sum() > 5
    runtime = OnnxRuntime(open_bundle(bundles, "large"))
    runtime.set_state({n: p.detach().float().numpy() for n, p in reference.parameters.items()})
    outputs = runtime.run("train", train_batch(x, answers, STILL))
    assert outputs["correct"] == 64


class NoPacking:
    """A codec that packs nothing, to show that packing has no other effect."""

    name = "none"

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Return no parts."""
        return {}

    def pack_as(self, h: Tensor, shapes: Mapping[str, Sequence[int | str]]) -> dict[str, Tensor]:
        """Return no parts."""
        return {}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Not used."""
        raise NotImplementedError

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """Return no tensors."""
        return ()

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """Not used."""
        raise NotImplementedError


def bundle_of(
    model: SplitModel,
    cut: int,
    x: Tensor,
    optimizer: str,
    codec: Codec,
    graphs: tuple[str, ...] = ("train",),
) -> Bundle:
    """Return a bundle in memory with some of the graphs, without verification."""
    model.add_heads([cut], x, CLASSES)
    segment = ClientSegment(model, cut)
    steps = ClientSteps(segment, get_optimizer(optimizer), codec, x, CLASSES)
    wanted = [step for step in all_steps(steps) if step.name in graphs]
    manifest = Manifest(
        tier="test",
        cut=cut,
        runtime="onnx",
        task="classes",
        classes=CLASSES,
        limits={},
        heads=tuple(segment.heads),
        optimizer=optimizer,
        codec=codec.name,
        packed=steps.packed,
        state=steps.state,
        graphs={step.name: Graph("", step.inputs, step.outputs) for step in wanted},
        initial_state="",
        constants=(),
        blobs={},
    )
    initial = {name: p.numpy() for name, p in steps.parameters.items()}
    return Bundle(manifest, {step.name: lower(step, traced(step)) for step in wanted}, initial)


def words(rows: int, seed: int) -> Tensor:
    """Return random integers for the embedding: short sentences in which words repeat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS, (rows, 5), generator=generator)


@pytest.fixture(scope="module")
def text_bundle() -> Bundle:
    """A bundle of the text model with AdamW and fp16, with all graphs."""
    graphs = ("train", "predict", "forward")
    return bundle_of(text_model(words=WORDS), 2, words(8, 0), "adamw", get_codec("fp16"), graphs)


def test_adamw_on_tokens(text_bundle: Bundle) -> None:
    """The model has an embedding with repeated words, attention and GELU; it packs (B, T, C)."""
    model = text_model(words=WORDS)
    model.add_heads([2], words(8, 0), CLASSES)
    runtime, reference = OnnxRuntime(text_bundle), Reference(model, 2, ADAMW)
    inputs = [words(rows, seed=rows) for rows in BATCHES]
    assert_answers(runtime, reference, inputs)
    assert_trains(runtime, reference, inputs, ADAMW)
    assert_answers(runtime, reference, inputs)


@pytest.fixture(scope="module")
def by_codec() -> dict[str, Bundle]:
    """Bundles of one model with int8, fp16 and no packing; activations are (B, C)."""
    codecs: tuple[Codec, ...] = (get_codec("int8"), get_codec("fp16"), NoPacking())
    x = example(FEATURES)
    return {c.name: bundle_of(token_model(), 1, x, "sgd", c) for c in codecs}


def test_packing_changes_neither_loss_nor_gradients(by_codec: dict[str, Bundle]) -> None:
    """The local loss uses unpacked activations, so the codec has no effect on it."""
    losses: dict[str, list[Array]] = {}
    states: dict[str, dict[str, Array]] = {}
    for name, bundle in by_codec.items():
        runtime = OnnxRuntime(bundle)
        losses[name] = []
        for number, rows in enumerate(BATCHES):
            x, y = example(FEATURES, rows, seed=number), labels(rows, number)
            outputs = runtime.run("train", train_batch(x, y, SGD))
            losses[name].append(outputs["loss"])
        states[name] = runtime.get_state()
    moved = max(
        np.abs(v - by_codec["none"].initial_state[n]).max() for n, v in states["none"].items()
    )
    assert moved > 0.1
    for name in ("int8", "fp16"):
        np.testing.assert_allclose(losses[name], losses["none"], rtol=1e-6)
        for tensor, value in states["none"].items():
            np.testing.assert_allclose(
                states[name][tensor], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}: {tensor}"
            )


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_sgd_on_vectors(by_codec: dict[str, Bundle], codec: str) -> None:
    """LayerNorm and GELU on (B, C) equal the reference."""
    model = token_model()
    model.add_heads([1], example(FEATURES), CLASSES)
    inputs = [example(FEATURES, rows, seed=rows) for rows in BATCHES]
    assert_trains(OnnxRuntime(by_codec[codec]), Reference(model, 1, SGD), inputs, SGD)


# The runtime.


@pytest.fixture
def runtime(bundles: BundleIndex) -> OnnxRuntime:
    """The runtime of the smallest tier."""
    return OnnxRuntime(open_bundle(bundles, "small"))


def some_batch(rows: int = 4, seed: int = 0, hyper: dict[str, float] = SGD) -> dict[str, Array]:
    """Return a batch of images for the training graph."""
    return train_batch(example(IMAGE, rows, seed), labels(rows, seed), hyper)


def test_outputs_stay_as_they_were(runtime: OnnxRuntime) -> None:
    """Activations wait in a queue during training, so no later step may write into them."""
    kept: list[tuple[dict[str, Array], dict[str, Array]]] = []
    for seed in range(4):
        for graph in ("train", "predict", "forward"):
            batch = some_batch(seed=seed)
            outputs = runtime.run(graph, batch if graph == "train" else {"x": batch["x"]})
            kept.append((outputs, {name: array.copy() for name, array in outputs.items()}))
    for outputs, copies in kept:
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, copies[name])
    first, last = kept[0][0]["h.q"], kept[-3][0]["h.q"]
    assert not np.array_equal(first, last)


def test_outputs_survive_the_runtime(bundles: BundleIndex) -> None:
    """Outputs own their memory."""
    runtime = OnnxRuntime(open_bundle(bundles, "small"))
    outputs = runtime.run("train", some_batch())
    state = runtime.get_state()
    copies = {name: array.copy() for name, array in (outputs | state).items()}
    del runtime
    for name, array in (outputs | state).items():
        np.testing.assert_array_equal(array, copies[name])


def test_inputs_are_left_alone(runtime: OnnxRuntime) -> None:
    """A step does not change its batch, and the batch may be changed after the step."""
    batch = some_batch()
    before = {name: array.copy() for name, array in batch.items()}
    runtime.run("train", batch)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, before[name])
    again = runtime.get_state()
    batch["x"][:] = 0
    for name, array in runtime.get_state().items():
        np.testing.assert_array_equal(array, again[name])


def test_state_round_trip(runtime: OnnxRuntime) -> None:
    """The state is equal bit for bit in both sets of buffers, and it is copied in and out."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        state = {
            spec.name: rng.standard_normal(spec.shape).astype(np.float32)
            for spec in runtime.manifest.exchanged()
        }
        runtime.set_state(state)
        found = runtime.get_state()
        assert list(found) == [spec.name for spec in runtime.manifest.exchanged()]
        for name, array in state.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == np.float32
            array[...] = 7
            found[name][...] = 9
        untouched = runtime.get_state()
        assert not any((array == 7).any() or (array == 9).any() for array in untouched.values())
        runtime.run("train", some_batch())  # the next round writes the other buffers


def test_initial_state_is_that_of_the_bundle(bundles: BundleIndex, model: SplitModel) -> None:
    """A device starts from the exported weights."""
    bundle = open_bundle(bundles, "large")
    weights = dict(model.named_parameters())
    state = OnnxRuntime(bundle).get_state()
    assert set(state) == {n for n in weights if layer_of(n) in model.client_layers(3)}
    for name, array in state.items():
        np.testing.assert_array_equal(array, weights[name].detach().numpy())


def test_set_state_resets_the_optimizer(runtime: OnnxRuntime) -> None:
    """Momentum must not pass from one round to the next; the test would detect it."""
    initial = runtime.get_state()

    def round_of_two() -> dict[str, Array]:
        for seed in range(2):
            runtime.run("train", some_batch(seed=seed))
        return runtime.get_state()

    first = round_of_two()
    runtime.set_state(initial)
    again = round_of_two()
    went_on = round_of_two()
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
    assert any(not np.array_equal(went_on[name], array) for name, array in first.items())


def test_adamw_slots_are_reset(text_bundle: Bundle) -> None:
    """The step count and both moments are reset."""
    runtime = OnnxRuntime(text_bundle)
    batch = train_batch(words(4, 1), labels(4, 1), ADAMW)
    runtime.run("train", batch)
    first = runtime.get_state()
    runtime.run("train", batch)
    runtime.set_state(text_bundle.initial_state)
    runtime.run("train", batch)
    for name, array in runtime.get_state().items():
        np.testing.assert_array_equal(array, first[name])


def test_answering_changes_nothing(runtime: OnnxRuntime) -> None:
    """``predict`` and ``forward`` between two steps do not change state and momentum."""
    initial = runtime.get_state()
    runtime.run("train", some_batch(seed=0))
    runtime.run("train", some_batch(seed=1))
    plain = runtime.get_state()
    runtime.set_state(initial)
    runtime.run("train", some_batch(seed=0))
    for graph in ("predict", "forward", "predict"):
        runtime.run(graph, {"x": example(IMAGE, 3).numpy()})
    runtime.run("train", some_batch(seed=1))
    for name, array in runtime.get_state().items():
        np.testing.assert_array_equal(array, plain[name])


def test_a_step_that_fails_changes_nothing(runtime: OnnxRuntime) -> None:
    """The error names the missing input, and the state does not change."""
    runtime.run("train", some_batch(seed=0))
    before = runtime.get_state()
    batch = some_batch(seed=1)
    del batch["y"]
    with pytest.raises(DataError, match=r"the graph 'train' needs the input 'y'"):
        runtime.run("train", batch)
    for name, array in runtime.get_state().items():
        np.testing.assert_array_equal(array, before[name])


def test_states_that_do_not_fit(runtime: OnnxRuntime) -> None:
    """The error names the tensor and both shapes."""
    state = runtime.get_state()
    with pytest.raises(BundleError, match=r"stem\.bias is missing, must be \(6,\)"):
        runtime.set_state({n: a for n, a in state.items() if n != "stem.bias"})
    with pytest.raises(BundleError, match=r"stem\.bias has shape \(5,\), must be \(6,\)"):
        runtime.set_state(state | {"stem.bias": np.zeros(5, np.float32)})


def test_predicting_while_training(runtime: OnnxRuntime) -> None:
    """Two threads take turns; with a learning rate of zero, all predictions are equal."""
    x = example(IMAGE, 4).numpy()
    want = runtime.run("predict", {"x": x})
    found: list[dict[str, Array]] = []

    def predict() -> None:
        found.extend(runtime.run("predict", {"x": x}) for _ in range(40))

    thread = threading.Thread(target=predict)
    thread.start()
    for seed in range(40):
        runtime.run("train", some_batch(seed=seed, hyper=STILL))
    thread.join()
    assert len(found) == 40
    for outputs in found:
        for name, array in want.items():
            np.testing.assert_array_equal(outputs[name], array)


def test_forks_are_devices_of_their_own(bundles: BundleIndex) -> None:
    """Forks train like separately loaded runtimes, bit for bit, also with alternating steps."""
    bundle = open_bundle(bundles, "small")
    original = OnnxRuntime(bundle)
    original.run("train", some_batch(seed=9))
    forks = [original.fork(), original.fork().fork()]
    apart = [OnnxRuntime(bundle) for _ in forks]
    trained_once = original.get_state()
    for step in range(3):
        for number, (fork, own) in enumerate(zip(forks, apart, strict=True)):
            batch = some_batch(seed=10 * number + step)
            for graph, feeds in (("train", batch), ("predict", {"x": batch["x"]})):
                got, want = fork.run(graph, feeds), own.run(graph, feeds)
                for name, array in want.items():
                    np.testing.assert_array_equal(got[name], array)
    states = [fork.get_state() for fork in forks]
    for state, own in zip(states, apart, strict=True):
        for name, array in own.get_state().items():
            np.testing.assert_array_equal(state[name], array)
    assert any(not np.array_equal(states[0][name], states[1][name]) for name in states[0])
    for name, array in original.get_state().items():
        np.testing.assert_array_equal(array, trained_once[name])


def test_forks_load_a_graph_once(bundles: BundleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first runtime that runs a graph loads it, also if all start at the same time."""
    loaded = []
    session = onnxruntime.InferenceSession

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append(arguments)
        time.sleep(0.05)  # the other runtimes arrive during the load
        return session(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", load)
    original = OnnxRuntime(open_bundle(bundles, "small"))
    x = example(IMAGE).numpy()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(original.fork().run, "predict", {"x": x}) for _ in range(4)]
        answers = [future.result()["logits"] for future in futures]
    assert len(loaded) == 1
    original.run("train", some_batch())
    original.fork().run("train", some_batch())
    assert len(loaded) == 2
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])


DEVICE = """
import sys
from pathlib import Path
import numpy as np
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.runtime.onnx import OnnxRuntime
from tests.lib.models import open_bundle

def resident_bytes():
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(row for row in rows if row.startswith("VmRSS")).split()[1])

bundle = open_bundle(BundleIndex.read(Path(sys.argv[1])), "a")
before = resident_bytes()
runtime = OnnxRuntime(bundle)
for graph in ("predict", "forward"):
    runtime.run(graph, {"x": np.ones((4, 6), np.int64)})
print(resident_bytes() - before, bundle.constants["stem.weight"].nbytes)
"""
"""Prints how much memory the runtime takes, and the size of the frozen table."""


def test_frozen_tensors_are_in_memory_once(tmp_path: Path) -> None:
    """A session uses the bundle's memory and makes no copy, in a process of its own."""
    model = text_model(width=128, words=1 << 17)
    model.stem.requires_grad_(False)
    index = export_bundles(
        model, {"a": Tier(1)}, tmp_path / "out", example=words(4, 0), classes=CLASSES
    )
    done = subprocess.run(
        [sys.executable, "-c", DEVICE, str(index.folder)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken, table = map(int, done.stdout.split())
    assert taken < table / 2


def test_transposed_frozen_tensors_are_read_as_stored() -> None:
    """A weight is used in two products, forward and backward, without a transposed copy."""
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(*FEATURES, 7), nn.Linear(7, 7, bias=False))
    blocks = [nn.Linear(7, 7, bias=False).requires_grad_(False), nn.Identity()]
    model = SplitModel(frozen, blocks, nn.Linear(7, CLASSES))
    x = example(FEATURES)
    model.add_heads([1], x, CLASSES)
    steps = ClientSteps(
        ClientSegment(model, 1), get_optimizer("sgd"), get_codec("int8"), x, CLASSES
    )
    lowered = lower_all("onnx", [train(steps)], {})
    graph = onnx.load_model_from_string(lowered.files["train"]).graph
    constants = {t.name for t in graph.initializer}
    weight = "block.0.weight"
    flipped = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants]
    assert weight in constants
    assert not flipped
    assert sorted(n.op_type for n in graph.node if weight in n.input) == ["Gemm", "MatMul"]
    verify(steps, train(steps), run_files("onnx", lowered), x)


def test_broken_graphs_and_other_runtimes(bundles: BundleIndex) -> None:
    """The BundleError names the graph or the runtime."""
    bundle = open_bundle(bundles, "small")
    graphs = {**bundle.graphs, "train": b"no ONNX"}
    broken = OnnxRuntime(Bundle(bundle.manifest, graphs, bundle.initial_state))
    for _ in range(2):
        with pytest.raises(BundleError, match="cannot load the graph 'train'"):
            broken.run("train", some_batch())
    broken.run("predict", {"x": example(IMAGE).numpy()})
    other = copy.copy(bundle.manifest)
    object.__setattr__(other, "runtime", "abacus")
    with pytest.raises(BundleError, match="for the runtime 'abacus'"):
        load_runtime(Bundle(other, bundle.graphs, bundle.initial_state))
    assert isinstance(load_runtime(bundle), OnnxRuntime)


# The learner.

ROWS = 11
PLAN = LocalPlan(epochs=1, batch_size=4, hyper=STILL, activations="train", seed=3)


@pytest.fixture
def data() -> Examples:
    """Eleven images: with batches of four, the last batch has three."""
    return Examples(example(IMAGE, ROWS, seed=5).numpy(), labels(ROWS, 5).numpy())


@pytest.fixture
def learner(runtime: OnnxRuntime) -> Learner:
    """A learner of the smallest tier."""
    return Learner(runtime.manifest, runtime)


class Emitted:
    """Collects the batches that a learner emits."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, dict[str, Array], Array]] = []

    def __call__(self, number: int, batch: Batch) -> None:
        assert batch.labels is not None
        self.batches.append((number, batch.parts, batch.labels))

    def rows(self, h: Tensor) -> list[int]:
        """Find the example of each emitted row by its activations in ``h``."""
        found = []
        for _, packed, _ in self.batches:
            values = packed["h.q"] * packed["h.scale"]
            for row in values:
                distance = np.abs(h.numpy() - row).reshape(len(h), -1).max(1)
                assert distance.min() < 0.1 * np.sort(distance)[1], "no example stands out"
                found.append(int(distance.argmin()))
        return found


@pytest.mark.parametrize("activations", ["train", "forward"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_example_is_emitted_once(
    learner: Learner, model: SplitModel, data: Examples, activations: str, epochs: int
) -> None:
    """Every example is emitted with its label, in batches numbered from zero."""
    emitted = Emitted()
    plan = LocalPlan(epochs, 4, STILL, activations, seed=3)
    learner.train(learner.runtime.get_state(), data, plan, emitted)
    assert [number for number, _, _ in emitted.batches] == [0, 1, 2]
    assert [len(y) for _, _, y in emitted.batches] == [4, 4, 3]
    for _, packed, y in emitted.batches:
        symbols = {"batch": len(y)}
        check_tensors(packed, learner.manifest.packed, symbols)
    with torch.no_grad():
        h, _ = Reference(model, 1, STILL).answers(torch.from_numpy(data.x))
    rows = emitted.rows(h)
    assert sorted(rows) == list(range(ROWS))
    assert rows != list(range(ROWS)), "batches are shuffled"
    assert [int(label) for _, _, y in emitted.batches for label in y] == data.y[rows].tolist()


def test_nothing_is_emitted_when_not_asked(learner: Learner, data: Examples) -> None:
    """In a round without activations nothing is emitted."""
    emitted = Emitted()
    plan = LocalPlan(2, 4, SGD, "none", seed=3)
    result = learner.train(learner.runtime.get_state(), data, plan, emitted)
    assert emitted.batches == []
    assert result.samples == ROWS


def test_forward_emits_activations_of_the_parameters_it_got(
    learner: Learner, model: SplitModel, data: Examples
) -> None:
    """Activations are computed before training, with one set of parameters, at any rate."""
    emitted = Emitted()
    learner.train(
        learner.runtime.get_state(), data, LocalPlan(2, 4, SGD, "forward", seed=3), emitted
    )
    with torch.no_grad():
        h, _ = Reference(model, 1, SGD).answers(torch.from_numpy(data.x))
    assert sorted(emitted.rows(h)) == list(range(ROWS))


def test_metrics_are_means_over_examples(
    learner: Learner, model: SplitModel, data: Examples
) -> None:
    """Each example counts once, also those in a short last batch."""
    result = learner.train(learner.runtime.get_state(), data, PLAN, lambda *_: None)
    with torch.no_grad():
        loss, correct, _ = Reference(model, 1, STILL).loss(
            torch.from_numpy(data.x), torch.from_numpy(data.y)
        )
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result.metrics["accuracy"] == pytest.approx(float(correct) / ROWS)
    assert result.samples == ROWS


@pytest.mark.parametrize("activations", ["train", "forward", "none"])
def test_epochs_train_on(
    learner: Learner, model: SplitModel, data: Examples, activations: str
) -> None:
    """Three epochs of one batch are three steps; the metrics are those of the last epoch."""
    reference = Reference(model, 1, SGD)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    for _ in range(3):
        loss, correct, _ = reference.step(x, y)
    plan = LocalPlan(3, 100, SGD, activations, seed=0)
    result = learner.train(learner.runtime.get_state(), data, plan, lambda *_: None)
    reference.assert_parameters(result.state)
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert result.metrics["accuracy"] == pytest.approx(correct / ROWS)


def test_rounds_are_reproducible(learner: Learner, data: Examples) -> None:
    """Equal state, data and seed give equal parameters; another seed gives another order."""
    state = learner.runtime.get_state()
    results = [
        learner.train(state, data, LocalPlan(2, 4, SGD, "train", seed), lambda *_: None).state
        for seed in (1, 1, 2)
    ]
    for name, array in results[0].items():
        np.testing.assert_array_equal(results[1][name], array)
    assert any(not np.array_equal(results[2][n], array) for n, array in results[0].items())


def test_predict_answers_with_what_was_learned(
    learner: Learner, model: SplitModel, data: Examples
) -> None:
    """The result has the logits of every head, and activations for the hub."""
    reference = Reference(model, 1, SGD)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    reference.step(x, y)
    learner.train(
        learner.runtime.get_state(), data, LocalPlan(1, 100, SGD, "none", 0), lambda *_: None
    )
    logits, packed = learner.predict(data.x[:2])
    with torch.no_grad():
        h, want = reference.answers(x[:2])
    np.testing.assert_allclose(logits, want.numpy(), rtol=1e-4, atol=1e-4)
    assert logits.shape == (1, 2, CLASSES)
    assert_packed(packed, h)


def test_heads_of_the_reference_are_all_there(model: SplitModel) -> None:
    """The fixture has a head at every cut, so tiers have one, two and three heads."""
    assert model.head_depths == [1, 2, 3]
    assert conv_model().head_depths == []
