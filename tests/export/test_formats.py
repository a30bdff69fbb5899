"""Trained models in formats of other software, opened as that software opens them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.self_check import check_sample
from export.adapters_lora.lora import adapted_modules, merge
from export.bundles.quantized import LossCheck
from export.bundles.writer import Tier, export_bundles
from export.cutting.from_module import from_module
from export.cutting.pretrained import save_original
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.formats import onnx_file
from export.formats.checking import check
from export.formats.inference import Heads, InferenceGraph
from export.formats.onnx_file import write_onnx
from export.formats.ship import Choice, ship
from export.formats.trained import TrainedModel
from tests.lib import adapted_gpt2
from tests.lib.models import CLASSES, IMAGE, conv_model, example, open_bundle, text_model

WORDS = 12
ABOUT = {
    "title": "a model", "version": "0.0", "method": "FedSplitX", "rounds": 3, "tiers": {},
    "source": None, "measured_by_hub": {},
}  # fmt: skip


def batch_norm_model() -> SplitModel:
    """Two blocks with BatchNorm, whose statistics are not those of new ones."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return SplitModel(nn.Conv2d(IMAGE[0], 6, 3), [block() for _ in range(3)], head)


def texts(rows: int, words: int = WORDS, length: int = 5) -> Tensor:
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], SplitModel], Callable[[int], Tensor], int]] = {
    "conv": (conv_model, lambda rows: example(IMAGE, rows), CLASSES),
    "batch-norm": (batch_norm_model, lambda rows: example(IMAGE, rows), CLASSES),
    "text": (text_model, texts, CLASSES),
    "gpt2": (adapted_gpt2.build, lambda rows: adapted_gpt2.texts(rows, 0)[0], adapted_gpt2.WORDS),
}
"""Builder, inputs and number of classes of each model."""


def trained(
    kind: str, folder: Path, *, held_out: int = 0, runtime: str = "torch", **tier: Any
) -> TrainedModel:
    """Return a model with auxiliary heads at cuts 1 and 2, all of whose tensors are random."""
    build, inputs, classes = MODELS[kind]
    model, x = build(), inputs(8)
    tiers = {f"cut-{cut}": Tier(cut, runtime=runtime, batch=4, **tier) for cut in (1, 2)}  # type: ignore[arg-type]
    int8 = LossCheck(Examples(x.numpy(), labels(kind, 8)), allow_loss=True) if tier else None
    index = export_bundles(
        model, tiers, folder, example=x, classes=classes, verified=False, int8=int8
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for name, tensor in model.trained().items():
            tensor.add_(0.2 * torch.rand_like(tensor) if "var" in name else
                        0.2 * torch.randn_like(tensor))  # fmt: skip
    about = {**ABOUT, "tiers": {name: entry.cut for name, entry in index.tiers.items()}}
    examples = Examples(inputs(held_out).numpy(), labels(kind, held_out)) if held_out else None
    return TrainedModel(model, dict.fromkeys(index.tiers, model), index, about, held_out=examples)


def labels(kind: str, rows: int) -> Array:
    """Return random labels."""
    rng = np.random.default_rng(3)
    if kind == "gpt2":
        return rng.integers(-1, adapted_gpt2.WORDS, (rows, adapted_gpt2.LENGTH))
    return rng.integers(0, CLASSES, rows)


def answers(model: SplitModel, x: Tensor) -> dict[str, Array]:
    """Return the logits of every head, in float64, by the parts of the model one after another."""
    model = copy.deepcopy(model).double().eval()
    h = model.stem(x.double() if x.is_floating_point() else x)
    found = {}
    with torch.no_grad():
        for depth, block in enumerate(model.block, start=1):
            h = block(h)
            if depth in model.head_depths:
                found[f"aux.{depth}"] = model.answer(depth, h).numpy()
        found["head"] = model.head(h).numpy()
    return found


def close(got: Array, want: Array, tolerance: float) -> None:
    """Check the largest difference as a fraction of the largest logit."""
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


# --- ONNX ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["conv", "batch-norm", "text", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_onnx_answers_as_the_model(kind: str, tmp_path: Path) -> None:
    """Every head is a named output of a file with its weights inside, for any batch."""
    found = trained(kind, tmp_path / "bundles")
    before = copy.deepcopy(found.model)
    names = ("onnx", "onnx-fp16", "onnx-int8")
    card = ship(found, Choice(names), tmp_path / "out")
    for file, tolerance in zip(card.files, (1e-5, 3e-3, 0.1), strict=True):
        path = tmp_path / "out" / file.path
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
        assert file.size == path.stat().st_size
        assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
        about = json.loads(model.metadata_props[0].value)
        assert (about["method"], about["rounds"], about["heads"]) == ("FedSplitX", 3, file.heads)
        opened = session(path)
        assert [output.name for output in opened.get_outputs()] == ["aux.1", "aux.2", "head"]
        for rows in (1, 5):
            x = MODELS[kind][1](rows)
            want = answers(before, x)
            for head, got in zip(want, opened.run(list(want), {"x": x.numpy()}), strict=True):
                close(got, want[head], tolerance)
    sizes = [file.size for file in card.files]
    assert sizes[0] > max(sizes[1:])


def test_texts_may_be_shorter(tmp_path: Path) -> None:
    found = trained("gpt2", tmp_path / "bundles")
    before = copy.deepcopy(found.model)
    ship(found, Choice(["onnx"]), tmp_path / "out")
    x = MODELS["gpt2"][1](3)[:, :4]
    (got,) = session(tmp_path / "out" / "model.onnx").run(["head"], {"x": x.numpy()})
    close(got, answers(before, x)["head"], 1e-5)


def test_a_tier_holds_no_more_than_its_devices(tmp_path: Path) -> None:
    """The graph of a tier has the heads of its devices, and no block above its cut."""
    found = trained("conv", tmp_path / "bundles")
    ship(found, Choice(["onnx"], tier="cut-1"), tmp_path / "tier")
    ship(found, Choice(["onnx"], heads=["head"]), tmp_path / "head")
    x = MODELS["conv"][1](3)
    for folder, names in (("tier", ["aux.1"]), ("head", ["head"])):
        opened = session(tmp_path / folder / "model.onnx")
        assert [output.name for output in opened.get_outputs()] == names
        (got,) = opened.run(names, {"x": x.numpy()})
        close(got, answers(found.model, x)[names[0]], 1e-5)
    sizes = [
        sum(
            np.prod(t.dims)
            for t in onnx.load(tmp_path / folder / "model.onnx").graph.initializer
            if t.data_type == onnx.TensorProto.FLOAT
        )
        for folder in ("tier", "head")
    ]
    parts = found.model
    alone = [parts.stem, parts.block[0], parts.aux["1"]]
    whole = [parts.stem, parts.block, parts.head]
    for size, held in zip(sizes, (alone, whole), strict=True):
        wanted = sum(p.numel() for part in held for p in part.parameters())  # type: ignore[attr-defined]
        assert wanted <= size < wanted + 60  # norms are written with further constants


def test_large_weights_are_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protobuf ends at 2 GB: weights beyond a bound are in a file that is found beside."""
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    found = trained("conv", tmp_path / "bundles")
    card = ship(found, Choice(["onnx"]), tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").glob("model.onnx*"))
    assert written == ["model.onnx", "model.onnx.data"]
    assert card.files[0].size == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("model.onnx*")
    )
    x = MODELS["conv"][1](3)
    (got,) = session(tmp_path / "out" / "model.onnx").run(["head"], {"x": x.numpy()})
    close(got, answers(found.model, x)["head"], 1e-5)


def test_scores_are_those_of_the_file(tmp_path: Path) -> None:
    """Accuracy and perplexity per output, compared with the definitions; latency is measured."""
    found = trained("conv", tmp_path / "a", held_out=50)
    card = ship(found, Choice(["onnx"]), tmp_path / "out")
    assert found.held_out is not None
    for head, logits in answers(found.model, torch.from_numpy(found.held_out.x)).items():
        want = (logits.argmax(-1) == found.held_out.y).mean()
        assert card.files[0].scores[head] == pytest.approx(want)
    assert card.files[0].latency_ms is not None
    assert card.files[0].latency_ms > 0
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"{100 * card.files[0].scores['head']:.1f} %" in page
    assert json.loads((tmp_path / "out" / "model.json").read_text()) == json.loads(
        json.dumps(card.to_json())
    )

    found = trained("gpt2", tmp_path / "b", held_out=6)
    before = copy.deepcopy(found.model)
    card = ship(found, Choice(["onnx"]), tmp_path / "texts")
    assert found.held_out is not None
    logits = torch.from_numpy(answers(before, torch.from_numpy(found.held_out.x))["head"])
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(found.held_out.y).flatten(), ignore_index=-1
    )
    assert card.files[0].scores["head"] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    ship(trained("conv", tmp_path / "a"), Choice(["onnx", "onnx-int8"]), tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured: there were no held-out examples." in page
    assert "What rounding the weights loses was not measured." in page


def test_a_loss_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    """int8 of a model whose labels are its own answers cannot gain; nothing is written."""
    found = trained("text", tmp_path / "a", held_out=4000)
    assert found.held_out is not None
    x = texts(4000)
    held_out = Examples(x.numpy(), answers(found.model, x)["head"].argmax(-1))
    found = replace(found, held_out=held_out)
    choice = Choice(["onnx-int8"], heads=["head"], max_loss=0.0)
    with pytest.raises(ExportError, match=r"onnx-int8: accuracy of head is 100.0 % in float32 and"):
        ship(found, choice, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    card = ship(found, replace(choice, allow_loss=True), tmp_path / "out")
    assert 0.9 < card.files[0].scores["head"] < 1


def test_a_file_that_differs_is_refused(tmp_path: Path) -> None:
    """The check compares the runtime with the model: one weight that is wrong is found."""
    found = trained("conv", tmp_path / "a")
    module = Heads(found.model, ["aux.1", "head"])
    signature, batches = found.signature(None, {}), [example(IMAGE, rows) for rows in (1, 3)]
    graph = InferenceGraph(module, {})
    run = write_onnx(tmp_path / "model.onnx", graph, signature, {}, batches[1])
    check(graph, module, run, batches)
    other = copy.deepcopy(module)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.startswith("block.0")).view(-1)[0] += 0.01
    wrong = write_onnx(
        tmp_path / "wrong.onnx", InferenceGraph(other, {}), signature, {}, batches[1]
    )
    with pytest.raises(
        ExportError, match=r"differs from the trained model in the logits of aux\.1"
    ):
        check(graph, module, wrong, batches)


# --- ExecuTorch ----------------------------------------------------------------------------------


def executed(path: Path, x: Tensor) -> tuple[list[Array], dict[str, Any]]:
    """Run a file with ExecuTorch's Python module; return logits, and its metadata."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    about = program.load_method("cutlayer")
    assert method is not None
    assert about is not None
    return [t.numpy().copy() for t in method.execute([x.contiguous()])], json.loads(
        about.execute([])[0]
    )


@pytest.mark.parametrize(
    "kind",
    ["conv", "text", pytest.param("batch-norm", marks=pytest.mark.slow),
     pytest.param("gpt2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_executorch_answers_as_the_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    found = trained(kind, tmp_path / "bundles")
    before = copy.deepcopy(found.model)
    ship(found, Choice(["executorch"], batch=3, length=6), tmp_path / "out")
    for rows in (1, 3):
        x = MODELS[kind][1](rows)[:, :6]
        want = answers(before, x)
        got, about = executed(tmp_path / "out" / "model.pte", x)
        for logits, head in zip(got, want, strict=True):
            close(logits, want[head], 1e-5)
        assert (about["heads"], about["weights"]) == (list(want), "float32")


def wide() -> SplitModel:
    """A model whose linear layers have 64 inputs."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)]
    return SplitModel(nn.Linear(3, 64), blocks, nn.Linear(64, CLASSES))


@pytest.mark.slow
def test_executorch_quantizes_linear_layers(tmp_path: Path) -> None:
    """8 and 4 bits answer nearly as float32 does, in smaller files."""
    pytest.importorskip("executorch")
    model, x = wide(), example((3,), 8)
    index = export_bundles(
        model, {"a": Tier(1, runtime="torch")}, tmp_path / "bundles", example=x,
        classes=CLASSES, verified=False,
    )  # fmt: skip
    found = TrainedModel(model, {"a": model}, index, ABOUT)
    names = ["executorch", "executorch-int8", "executorch-int4"]
    card = ship(found, Choice(names, batch=4), tmp_path / "out")
    want = answers(model, x[:4])
    for file, tolerance in zip(card.files, (1e-5, 0.05, 0.3), strict=True):
        got, about = executed(tmp_path / "out" / file.path, x[:4])
        assert about["weights"] == {"executorch": "float32"}.get(file.format, file.format[-4:])
        for logits, head in zip(got, want, strict=True):
            close(logits, want[head], tolerance)
            assert file.format == "executorch" or np.abs(logits - want[head]).max() > 0
    sizes = [file.size for file in card.files]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
def test_texts_are_cut_alike_for_the_model_and_the_file(tmp_path: Path) -> None:
    """What 8 bits lose is measured on the texts of a length that the file takes, on both sides."""
    pytest.importorskip("executorch")
    found = trained("gpt2", tmp_path / "bundles", held_out=16)
    assert found.held_out is not None
    y = np.array(found.held_out.y)
    # behind the cut labels are the model's own answers, so that it is better there than before
    y[:, 4:] = answers(found.model, torch.from_numpy(found.held_out.x))["head"].argmax(-1)[:, 4:]
    found = replace(found, held_out=Examples(found.held_out.x, y))
    choice = Choice(["executorch-int8"], heads=["head"], length=4, max_loss=0.05)
    card = ship(found, choice, tmp_path / "out")
    whole = ship(found, Choice(["onnx"], heads=["head"]), tmp_path / "whole")
    # so a comparison with the whole texts would have been refused
    allowed = 1 + choice.max_loss
    assert card.files[0].scores["head"] > allowed * whole.files[0].scores["head"]


def test_what_executorch_cannot_quantize_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    found = trained("conv", tmp_path / "bundles")
    with pytest.raises(ExportError, match=r"no linear layer with 32 inputs .* is executorch-int8"):
        ship(found, Choice(["executorch-int4"], heads=["head"]), tmp_path / "out")


# --- weights -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A module with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(IMAGE[0], 6, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            for _ in range(3)
        )
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        logits: Tensor = self.last(h.mean((2, 3)))
        return logits


def test_safetensors_load_into_the_original_module(tmp_path: Path) -> None:
    """The file has the names of the module that was cut, so ``load_state_dict`` takes it."""
    net, x = Net(), example(IMAGE, 8)
    model = from_module(
        net, stem="first", blocks="layers", head=[lambda h: h.mean((2, 3)), "last"], example=x
    )
    index = export_bundles(
        model, {"a": Tier(1, runtime="torch")}, tmp_path / "bundles", example=x,
        classes=CLASSES, verified=False,
    )  # fmt: skip
    with torch.no_grad():
        for tensor in model.trained().values():
            tensor.add_(torch.rand_like(tensor))
    found = TrainedModel(model, {"a": model}, index, ABOUT)
    ship(found, Choice(["safetensors"]), tmp_path / "out")
    other = Net()
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == other.state_dict().keys()
    other.load_state_dict(state)
    with torch.no_grad():
        got = other.eval()(x).numpy()
    close(got, answers(model, x)["head"], 1e-5)


def test_safetensors_of_a_split_model_have_its_names(tmp_path: Path) -> None:
    found = trained("conv", tmp_path / "bundles")
    ship(found, Choice(["safetensors"]), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    own = found.model.tensors()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())


@pytest.mark.filterwarnings("ignore:.*cutlayer_base")
def test_transformers_and_peft_answer_as_the_model(tmp_path: Path) -> None:
    """Merged weights load with from_pretrained, and adapters with PEFT on the original."""
    found = trained("gpt2", tmp_path / "bundles")
    save_original(found.model, tmp_path / "base")
    x = MODELS["gpt2"][1](3)
    want = answers(found.model, x)["head"]
    ship(found, Choice(["peft", "transformers"]), tmp_path / "out")
    assert not adapted_modules(found.model)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "transformers")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(original, tmp_path / "out" / "adapter")
    with torch.no_grad():
        close(adapted.double().eval()(x).logits.numpy(), want, 1e-9)
        close(merged.double().eval()(x).logits.numpy(), want, 1e-5)


def test_merging_is_exact_up_to_one_rounding() -> None:
    """A merged weight is W + scale B A, in float64, rounded once."""
    model = adapted_gpt2.build()
    expected = {}
    for name, module in adapted_modules(model).items():
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        change = module.scaling["default"] * (B.double() @ A.double())  # (out, in)
        base = module.get_base_layer().weight.double()
        expected[name] = (base + change.T).float()  # GPT-2's layers are (in, out)
    merge(model)
    for name, weight in expected.items():
        torch.testing.assert_close(
            model.get_submodule(name).weight,
            weight,
            rtol=1.2e-7,
            atol=0,  # type: ignore[arg-type]
        )
    assert not any("lora" in name for name, _ in model.named_parameters())


# --- bundles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [pytest.param({}, marks=pytest.mark.slow), {"cut_rank": 2}])
def test_bundles_start_from_the_trained_weights(tier: dict[str, Any], tmp_path: Path) -> None:
    """Devices answer with the trained state, in float32 and in int8."""
    build, inputs, classes = MODELS["gpt2"]
    model, x = build(), inputs(8)
    found: dict[str, Any] = {}
    index = export_bundles(
        model, {"a": Tier(2, precision="int8", **tier)}, tmp_path / "bundles", example=x,
        classes=classes, verified=False, compared=found.__setitem__,
        int8=LossCheck(Examples(x.numpy(), labels("gpt2", 8)), allow_loss=True),
    )  # fmt: skip
    with torch.no_grad():
        for tensor in model.trained().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    if tier:  # the product of the last block's adapters has the lower rank
        for name, tensor in model.trained().items():
            if name.startswith("block.1.") and "lora_A" in name:
                with torch.no_grad():
                    tensor[2:] = 0
    want = answers(model, x)
    out = TrainedModel(model, {"a": model}, index, {**ABOUT, "tiers": {"a": 2}})
    ship(out, Choice(["bundles"]), tmp_path / "out")
    bundle = open_bundle(BundleIndex.read(tmp_path / "out" / "bundles"), "a")
    learner = Learner(bundle.manifest, load_runtime(bundle))
    check_sample(learner, bundle.sample)
    assert not (bundle.sample["x"][:, None] == x.numpy()[None]).all(-1).any()  # nobody's data
    for precision, tolerance in (("float32", 1e-4), ("int8", 0.1)):
        got = learner.predict(x.numpy(), precision)[0]  # type: ignore[arg-type]
        close(got[-1], want["aux.2"], tolerance)


@pytest.mark.slow
def test_int8_of_executorch_is_lowered_again(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    found = trained("conv", tmp_path / "bundles", runtime="executorch", precision="int8")
    ship(found, Choice(["bundles"]), tmp_path / "out")
    bundle = open_bundle(BundleIndex.read(tmp_path / "out" / "bundles"), "cut-2")
    learner = Learner(bundle.manifest, load_runtime(bundle))
    x = MODELS["conv"][1](4)
    want = answers(found.model, x)
    close(learner.predict(x.numpy())[0][-1], want["aux.2"], 1e-4)
    close(learner.predict(x.numpy(), "int8")[0][-1], want["aux.2"], 0.1)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"formats": ["gguf"]}, "no format 'gguf'; there are onnx, onnx-fp16"),
        ({"formats": []}, "no format is given"),
        ({"formats": ["onnx", "onnx"]}, "given twice"),
        ({"formats": ["peft"], "tier": "cut-1"}, "peft holds the whole model"),
        ({"formats": ["onnx"], "batch": 0}, "the largest batch is 0"),
        ({"formats": ["onnx"], "max_loss": -0.1}, "the largest loss is -0.1"),
        ({"formats": ["onnx"], "tier": "huge"}, "no tier 'huge'; its tiers are cut-1, cut-2"),
        ({"formats": ["onnx"], "heads": ["aux.9"]}, "no head 'aux.9'; its heads are aux.1"),
    ],
)
def test_mistakes(choice: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = trained("conv", tmp_path / "bundles")
    with pytest.raises(ConfigError, match=said):
        ship(found, Choice(**choice), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bundles"]


def test_the_nearest_format_is_named(tmp_path: Path) -> None:
    """What a model cannot take, and what it can; nothing is written, and nothing is overwritten."""
    conv, out = trained("conv", tmp_path / "bundles"), tmp_path / "out"
    with pytest.raises(
        ExportError, match=r"does not come from transformers; the nearest .* safete"
    ):
        ship(conv, Choice(["onnx", "transformers"]), out)
    with pytest.raises(ExportError, match=r"does not come from there; the nearest .* safetensors"):
        ship(conv, Choice(["peft"]), out)
    gpt2 = trained("gpt2", tmp_path / "texts")
    merge(gpt2.model)
    with pytest.raises(ExportError, match="has no adapters; the nearest format is transformers"):
        ship(gpt2, Choice(["peft"]), out)
    assert not out.exists()
    out.mkdir()
    (out / "note.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="out exists; choose another folder"):
            ship(conv, Choice(["onnx"]), out, overwrite=overwrite)
    ship(conv, Choice(["onnx"]), tmp_path / "again")
    ship(conv, Choice(["onnx-int8"]), tmp_path / "again", overwrite=True)
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["README.md", "model.int8.onnx", "model.json"]


def test_float16_refuses_large_weights(tmp_path: Path) -> None:
    found = trained("conv", tmp_path / "bundles")
    with torch.no_grad():
        found.model.stem.weight[0, 0, 0, 0] = 1e5  # type: ignore[index, operator]
    with pytest.raises(ExportError, match=r"stem\.weight has values beyond 65504"):
        ship(found, Choice(["onnx-fp16"]), tmp_path / "out")


def test_executorch_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("conv", tmp_path / "bundles")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match=r"pip install 'cutlayer\[executorch\]', or write --format"
    ):
        ship(found, Choice(["executorch"]), tmp_path / "out")
