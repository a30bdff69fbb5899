"""The plan: costs against independent references, choices at exact limits, and commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.cli.bundle import bundle
from edge_sdk.cli.main import main
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.runtime import load_runtime
from edge_sdk.runtime.measure import Measurement, measure_apart
from export.bundles.tier_table import TiersConfig, TierTable
from export.bundles.writer import Tier, export_bundles
from export.cli.plan import parse_cuts
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.planning import measuring
from export.planning.cost import Cost, Failure, epoch_s
from export.planning.plan import Plan
from export.planning.planner import Planner
from tests.lib.models import (
    BUILD,
    CLASSES,
    FEATURES,
    IMAGE,
    ConvBlock,
    MeanHead,
    conv_model,
    example,
    open_bundle,
    token_model,
)
from tests.lib.plans import write_without_lowering

BATCH = 4


def costs_of(plan: Plan) -> list[Cost]:
    """Return the costs of a plan without failures."""
    assert all(isinstance(cost, Cost) for cost in plan.costs)
    return [cost for cost in plan.costs if isinstance(cost, Cost)]


@pytest.fixture(scope="module")
def conv_plan() -> Plan:
    """A measured plan with two tiers without limits and one whose limits are too low."""
    tiers = {
        "onnx": TierTable(batch=BATCH),
        "half": TierTable(batch=BATCH, codec="fp16"),
        "given": TierTable(batch=BATCH, cut=2, memory_mb=0.001),
    }
    with planner_for(tiers, conv_model(), example(IMAGE)) as planner:
        return planner.plan()


def fake_measure(folder: Path, tier: str, *args: Any) -> Measurement:
    """Return made-up measurements: 100 MB for a cut, and 10 MB for every further head."""
    manifest = BundleIndex.read(folder).manifest(tier)
    memory = 100_000_000 * manifest.cut + 10_000_000 * (len(manifest.heads) - 1)
    return Measurement(0.5, memory, memory + 50_000_000)


@pytest.fixture
def fake_memory() -> Iterator[None]:
    """Replace the measurement of memory by :func:`fake_measure`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "measure_apart", fake_measure)
        yield


@pytest.fixture
def unlowered(fake_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurement of memory, and lower nothing."""
    monkeypatch.setattr(measuring, "write_tier", write_without_lowering)


def planner_for(
    tiers: dict[str, TierTable], model: SplitModel | None = None, x: Tensor | None = None
) -> Planner:
    """Return a planner, by default for a model with cuts 1 and 2 on vectors of 6."""
    model, x = model or token_model(), example(FEATURES) if x is None else x
    return Planner(TiersConfig(tiers), model, x, CLASSES)


def plan_for(tiers: dict[str, TierTable], cuts: list[int] | None = None) -> Plan:
    """Return the plan for that model."""
    with planner_for(tiers) as planner:
        return planner.plan(cuts)


def choice_for(tiers: dict[str, TierTable]) -> dict[str, int]:
    """Return the cuts that an export of that model would have."""
    with planner_for(tiers) as planner:
        return planner.choose()


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list of cuts that would be lowered; nothing is."""
    cuts: list[int] = []

    def write(steps: Any, name: str, tier: Tier, *args: Any, **kwargs: Any) -> Any:
        cuts.append(tier.cut)
        return write_without_lowering(steps, name, tier, *args, **kwargs)

    monkeypatch.setattr(measuring, "write_tier", write)
    return cuts


@pytest.mark.slow
def test_every_cut_and_variant_has_a_row(conv_plan: Plan) -> None:
    rows = [(c.tier.cut, c.tier.codec, c.heads) for c in costs_of(conv_plan)]
    assert rows == [(cut, codec, (cut,)) for cut in (1, 2, 3) for codec in ("int8", "fp16")]


@pytest.mark.slow
def test_parameters_and_update_are_those_of_the_layers(conv_plan: Plan) -> None:
    width = 6
    stem, block, down = 9 * width + width, 9 * width**2 + 2 * width, 9 * width**2 + 3 * width
    model = conv_model()
    model.add_heads([1, 2, 3], example(IMAGE), CLASSES)
    head = sum(p.numel() for p in model.aux["1"].parameters())
    wanted = [stem + head + n for n in (block, 2 * block, 2 * block + down)]
    for cost in costs_of(conv_plan):
        assert cost.counts.parameters == wanted[cost.tier.cut - 1]
        assert cost.counts.update_bytes == 4 * wanted[cost.tier.cut - 1]
        assert cost.counts.frozen == 0


@pytest.mark.slow
def test_costs_grow_with_the_cut(conv_plan: Plan) -> None:
    for codec in ("int8", "fp16"):
        rows = [c for c in costs_of(conv_plan) if c.tier.codec == codec]
        for shallow, deep in pairwise(rows):
            assert shallow.counts.parameters < deep.counts.parameters
            assert shallow.counts.flops < deep.counts.flops
            assert shallow.bundle_bytes < deep.bundle_bytes
        assert rows[0].measured.memory_bytes < rows[-1].measured.memory_bytes
    for cost in costs_of(conv_plan):
        assert 0 < cost.measured.memory_bytes < cost.measured.process_bytes < 10**9
        assert cost.measured.step_s > 0


@pytest.mark.slow
def test_bytes_are_those_of_the_export(conv_plan: Plan, tmp_path: Path) -> None:
    tiers = {
        f"{cost.tier.codec}": replace(cost.tier)
        for cost in costs_of(conv_plan)
        if cost.tier.cut == 2
    }
    index = export_bundles(
        conv_model(), tiers, tmp_path / "out", example=example(IMAGE), classes=CLASSES
    )
    for cost in costs_of(conv_plan):
        if cost.tier.cut == 2:
            manifest = index.manifest(cost.tier.codec)
            assert cost.bundle_bytes == sum(manifest.blobs.values())
            assert cost.counts.update_bytes == sum(s.nbytes() for s in manifest.exchanged())
            runtime = load_runtime(open_bundle(index, cost.tier.codec))
            outputs = runtime.run("forward", {"x": np.zeros((BATCH, *IMAGE), np.float32)})
            sent = sum(array.nbytes for array in outputs.values())
            assert cost.counts.activation_bytes == sent / BATCH


@pytest.mark.slow
def test_a_given_cut_stays_and_is_said_to_be_over(conv_plan: Plan) -> None:
    choice = conv_plan.choices["given"]
    assert (choice.cut, choice.given, choice.fits) == (2, True, False)
    assert choice.reason.startswith("over its limits: cut 2 needs ")
    assert choice.reason.endswith(" MB, the tier has 0.001")


@pytest.mark.slow
def test_a_deeper_tier_holds_the_heads_of_others(conv_plan: Plan) -> None:
    for name in ("onnx", "half"):
        choice = conv_plan.choices[name]
        assert (choice.cut, choice.fits, choice.reason) == (3, True, "the deepest cut there is")
        assert isinstance(choice.cost, Cost)
        assert choice.cost.heads == (2, 3)


class Affine(nn.Module):
    """A linear layer without activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = self.linear(h)
        return result


@pytest.mark.usefixtures("unlowered")
def test_flops_of_linear_layers() -> None:
    inputs, width, cuts = 7, 10, 3
    blocks = [Affine(width) for _ in range(cuts + 1)]
    model = SplitModel(nn.Linear(inputs, width), blocks, MeanHead(width, CLASSES))
    with planner_for({"a": TierTable(batch=BATCH)}, model, torch.randn(4, inputs)) as planner:
        plan = planner.plan()
    view = SplitModel(model.stem, blocks, model.head)
    view.add_heads([1], torch.randn(4, inputs), CLASSES)
    head = sum(m.weight.numel() for m in view.aux["1"].modules() if isinstance(m, nn.Linear))
    for cost in costs_of(plan):
        # Two operations per weight and product: forward, gradient of weight, gradient of input.
        # The input gradient of the first layer is not needed.
        weights = cost.tier.cut * width**2 + head
        assert cost.counts.flops == 6 * weights + 4 * inputs * width


@pytest.mark.usefixtures("unlowered")
def test_frozen_layers_cost_no_weight_gradient() -> None:
    model = SplitModel(nn.Linear(6, 10), [Affine(10) for _ in range(3)], MeanHead(10, CLASSES))
    for parameter in (*model.stem.parameters(), *model.block[0].parameters()):
        parameter.requires_grad_(False)
    with planner_for({"a": TierTable(batch=BATCH)}, model) as planner:
        first = costs_of(planner.plan())[0]
    view = SplitModel(model.stem, list(model.block), model.head)
    view.add_heads([1], example(FEATURES), CLASSES)
    head = [m.weight.numel() for m in view.aux["1"].modules() if isinstance(m, nn.Linear)]
    assert first.counts.frozen == 70 + 110
    forward_only = 2 * (60 + 100)
    unwanted = 2 * head[0]  # no layer below the head's first layer needs a gradient
    assert first.counts.flops == forward_only + 6 * sum(head) - unwanted


@pytest.mark.parametrize(
    ("memory_mb", "cut", "reason"),
    [
        (200.0, 2, "the deepest cut there is"),
        (199.999, 1, "cut 2 needs 200.0 MB, the tier has 199.999"),
        (100.0, 1, "cut 2 needs 200.0 MB, the tier has 100"),
        (99.0, None, "can carry no cut: cut 1 needs 100.0 MB, the tier has 99"),
    ],
)
@pytest.mark.usefixtures("unlowered")
def test_memory_at_the_limit(memory_mb: float, cut: int | None, reason: str) -> None:
    tiers = {"a": TierTable(batch=BATCH, memory_mb=memory_mb)}
    choice = plan_for(tiers).choices["a"]
    assert (choice.cut, choice.reason, choice.fits) == (cut, reason, cut is not None)
    if cut is None:
        with pytest.raises(ExportError, match=r"tier 'a' can carry no cut: cut 1 needs 100\.0 MB"):
            choice_for(tiers)
    else:
        assert choice_for(tiers) == {"a": cut}


@pytest.mark.usefixtures("unlowered")
def test_time_at_the_limit() -> None:
    deep = costs_of(plan_for({"a": TierTable(batch=BATCH)}))[-1]
    slow = TierTable(batch=BATCH, gflops=0.001, uplink_mbit=1.0)
    seconds = epoch_s(slow, deep.counts)
    assert seconds is not None
    exact = {"a": replace(slow, max_epoch_s=seconds)}
    assert choice_for(exact) == {"a": 2}
    less = {"a": replace(slow, max_epoch_s=seconds * 0.9999)}
    assert choice_for(less) == {"a": 1}
    reason = plan_for(less).choices["a"].reason
    assert reason.startswith("cut 2 takes ")
    assert " s per epoch, the tier allows " in reason


def test_too_slow_is_known_without_lowering(lowered: list[int]) -> None:
    tiers = {"a": TierTable(batch=BATCH, gflops=1e-9, max_epoch_s=1)}
    with pytest.raises(ExportError, match="tier 'a' can carry no cut: cut 1 takes "):
        choice_for(tiers)
    assert lowered == []


@pytest.mark.usefixtures("unlowered")
def test_seconds_of_an_epoch() -> None:
    counts = costs_of(plan_for({"a": TierTable(batch=BATCH)}))[0].counts
    update = counts.update_bytes * 8 / 2e6
    upload = 50 * counts.activation_bytes * 8 / 2e6
    compute = 50 * counts.flops / 3e9
    table = TierTable(examples=50)
    assert epoch_s(table, counts) is None
    assert epoch_s(replace(table, gflops=3.0), counts) == pytest.approx(compute)
    assert epoch_s(replace(table, uplink_mbit=2.0), counts) == pytest.approx(upload + update)
    both = replace(table, gflops=3.0, uplink_mbit=2.0)
    assert epoch_s(both, counts) == pytest.approx(max(compute, upload) + update)
    slow = replace(both, gflops=1e-6)
    assert epoch_s(slow, counts) == pytest.approx(50 * counts.flops / 1e3 + update)


@pytest.mark.usefixtures("unlowered")
def test_the_head_of_a_shallow_tier_counts_for_a_deep_one() -> None:
    tiers = {
        "deep": TierTable(batch=BATCH, memory_mb=205),
        "shallow": TierTable(batch=BATCH, memory_mb=150),
    }
    assert plan_for({"deep": tiers["deep"]}).choices["deep"].cut == 2
    choices = plan_for(tiers).choices
    assert {name: choice.cut for name, choice in choices.items()} == {"deep": 1, "shallow": 1}
    assert choices["deep"].reason == "cut 2 needs 210.0 MB, the tier has 205"


@pytest.mark.usefixtures("unlowered")
def test_only_some_cuts() -> None:
    plan = plan_for({"a": TierTable(batch=BATCH)}, [1])
    assert [cost.tier.cut for cost in plan.costs] == [1]
    assert plan.choices["a"].cut == 1
    assert plan.choices["a"].reason == "the deepest cut that was asked about"
    for cuts in ([0], [3], [1, 9]):
        with pytest.raises(ExportError, match=r"outside the model: it has 3 blocks"):
            plan_for({"a": TierTable()}, cuts)
    with pytest.raises(ExportError, match=r"tier 'a': cut 7 is outside the model"):
        plan_for({"a": TierTable(cut=7)})


@pytest.mark.usefixtures("fake_memory")
def test_batches_share_a_lowered_bundle(lowered: list[int]) -> None:
    tiers = {"a": TierTable(batch=4, cut=1), "b": TierTable(batch=8, cut=1)}
    plan = plan_for(tiers)
    assert [(c.tier.cut, c.tier.batch) for c in plan.costs] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert lowered == [1, 2]


@pytest.mark.usefixtures("unlowered")
def test_the_model_stays_as_it_is() -> None:
    model = conv_model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with planner_for({"a": TierTable(batch=BATCH)}, model, example(IMAGE)) as planner:
        planner.plan([1])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in model.modules())


@pytest.mark.usefixtures("unlowered")
def test_a_block_that_cannot_be_exported() -> None:
    model = build_with_alpha_dropout()
    tiers = {"a": TierTable(batch=BATCH)}
    with planner_for(tiers, model, example(IMAGE)) as planner:
        plan = planner.plan()
        assert planner.choose() == {"a": 1}
    assert isinstance(plan.costs[1], Failure)
    assert "block.1.1 is a FeatureAlphaDropout" in plan.costs[1].error
    assert plan.choices["a"].reason.startswith("cut 2 cannot be exported: block.1.1 is a Feature")
    assert "FeatureAlphaDropout" in plan.to_json()["cuts"][1]["error"]


def test_a_step_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Measurement:
        raise BundleError("measuring was ended by signal 9")

    monkeypatch.setattr(measuring, "measure_apart", fail)
    with pytest.raises(ExportError, match=r"can carry no cut: cut 1 .*signal 9"):
        choice_for({"a": TierTable(batch=BATCH)})


@pytest.mark.usefixtures("fake_memory")
def test_quantized_inference_is_part_of_the_bundle() -> None:
    sizes = {}
    precisions: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")
    for precision in precisions:
        plan = plan_for({"a": TierTable(batch=BATCH, precision=precision)}, [1])
        sizes[precision] = costs_of(plan)[0].bundle_bytes
    assert sizes["int8"] > sizes["float32"]


@pytest.mark.slow
def test_executorch() -> None:
    pytest.importorskip("executorch")
    (cost,) = costs_of(plan_for({"a": TierTable(batch=8, runtime="executorch")}, [1]))
    assert 0 < cost.measured.memory_bytes < cost.measured.process_bytes


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a GPT-2 of three tiny blocks."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("gpt2") / "config.json"
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    path.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return path


TEXT_TIERS = """
length = 8
optimizer = "adamw"
[lora]
rank = 2
[tiers.watch]
batch = 2
memory_mb = 0.5
[tiers.phone]
batch = 2
memory_mb = 500
gflops = 1
uplink_mbit = 8
examples = 10
"""


@pytest.mark.slow
def test_the_command_on_adapters(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiers.toml").write_text(TEXT_TIERS)
    tiers, picture = ["--tiers", str(tmp_path / "tiers.toml")], tmp_path / "plan.png"
    run(["plan", str(tiny_gpt2), *tiers, "--json", "--picture", str(picture)])
    plan = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert set(plan) == {"cuts", "tiers"}
    assert [row["cut"] for row in plan["cuts"]] == [1, 2]
    for row in plan["cuts"]:
        # rank 2 of 16 -> 48 in each block; the head is 16 -> 8 -> 16 with a norm
        head = (16 * 8 + 8) + (8 * 16 + 16) + 2 * 16
        assert row["parameters"] == row["cut"] * 2 * (16 + 48) + head
        assert row["frozen"] == 40 * 16 + 32 * 16 + row["cut"] * (12 * 16**2 + 13 * 16)
        assert row["update_bytes"] == 4 * row["parameters"]
        assert row["tokens"] == 8
        assert row["activation_bytes"] == 16 + 16 * 4 / (2 * 8)
        seconds = max(10 * row["flops"] / 1e9, 10 * 8 * row["activation_bytes"] / 1e6)
        assert row["epoch_s"]["phone"] == pytest.approx(seconds + row["update_bytes"] / 1e6)
        assert row["epoch_s"]["watch"] is None
    watch, phone = plan["tiers"]["watch"], plan["tiers"]["phone"]
    assert (watch["cut"], watch["cost"], watch["fits"]) == (None, None, False)
    assert watch["reason"].startswith("can carry no cut: cut 1 needs ")
    assert (phone["cut"], phone["fits"], phone["given"]) == (2, True, False)
    assert phone["cost"]["heads"] == [2]
    out = tmp_path / "bundles"
    assert "tier 'watch' can carry no cut: cut 1 needs " in refusal(
        ["export", str(tiny_gpt2), *tiers, "--out", str(out)], capsys
    )
    assert not out.exists()


@pytest.mark.slow
def test_export_uses_the_plans_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiers.toml").write_text(
        "classes = 10\ninput_shape = [1, 8, 8]\n"
        "[tiers.a]\ncut = 1\nbatch = 4\n[tiers.c]\nbatch = 4\n"
        "gflops = 0.001\nmax_epoch_s = 285\n"
    )
    tiers = ["--tiers", str(tmp_path / "tiers.toml")]
    run(["plan", BUILD, *tiers, "--json"])
    plan = json.loads(capsys.readouterr().out)
    run(["export", BUILD, *tiers, "--out", str(tmp_path / "out"), "--json"])
    exported = json.loads(capsys.readouterr().out)
    assert {name: tier["cut"] for name, tier in exported.items()} == {"a": 1, "c": 2}
    for name, tier in plan["tiers"].items():
        assert tier["cut"] == exported[name]["cut"]
        assert tier["cost"]["bundle_bytes"] == exported[name]["bundle_bytes"]
        assert tier["cost"]["parameters"] == exported[name]["parameters"]


@pytest.mark.usefixtures("unlowered")
def test_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tiers.toml").write_text(
        "classes = 10\ninput_shape = [1, 8, 8]\n[tiers.phone]\nbatch = 4\ngflops = 1\n"
        '[tiers.watch]\nbatch = 4\nmemory_mb = 0.1\ncodec = "fp16"\n'
    )
    run(["plan", BUILD, "--tiers", str(tmp_path / "tiers.toml"), "--cuts", "2"])
    out = capsys.readouterr().out
    for text in ("what a cut costs", "onnx int8", "onnx fp16", "1,614", "0.268", "phone", "watch"):
        assert text in out
    words = " ".join(out.replace("│", " ").split())
    assert "can carry no cut: cut" in words
    assert "asked about" in words


@pytest.mark.usefixtures("unlowered")
def test_the_table_says_why_a_cut_is_impossible(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(
        "input_shape = [1, 8, 8]\n[tiers.a]\ncut = 1\n[tiers.b]\ncut = 2\n[tiers.c]\ncut = 1\n"
    )
    run(["plan", f"{__name__}:build_with_alpha_dropout", "--tiers", str(tiers)])
    out = capsys.readouterr().out
    assert out.count("cut 2, onnx int8, is impossible: block.1.1 is a FeatureAlphaDropout") == 1
    assert "epoch s" not in out
    assert "a step runs train" in out
    why = " ".join(out.replace("│", " ").split())
    assert "within its limits" not in why, "there are none"


def build_with_alpha_dropout() -> SplitModel:
    """Return a model whose second block cannot be exported."""
    blocks = [ConvBlock(6), nn.Sequential(ConvBlock(6), nn.FeatureAlphaDropout(0.1)), ConvBlock(6)]
    return SplitModel(nn.Conv2d(1, 6, 3, padding=1), blocks, MeanHead(6, CLASSES))


def run(arguments: list[str]) -> None:
    """Run ``cutlayer``, which must succeed."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run ``cutlayer``, which must fail with exit code 2; return its error of one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


GOOD = "classes = 10\ninput_shape = [1, 8, 8]\n[tiers.a]\n"


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (GOOD + "ram = 3", [], "unknown key 'ram'"),
        (GOOD + "memory_mb = 0", [], "memory_mb is 0.0; it must be above 0"),
        (GOOD + 'memory = "small"', [], "memory is 'small', must be"),
        (GOOD + 'runtime = "executorch"\nmemory = "low"', [], "has no effect on executorch"),
        (GOOD + "max_epoch_s = 9", [], "max_epoch_s has no effect without gflops or uplink_mbit"),
        (
            'graphs = ["back"]\n' + GOOD,
            [],
            "there is no optional graph 'back'; there are activate,",
        ),
        (GOOD + 'graphs = ["mix_2"]', [], "there is no optional graph 'mix_2'"),
        (GOOD + "cut = 9", [], "tier 'a': cut 9 is outside the model: it has 4 blocks"),
        ("classes = 10\n[tiers.a]", [], "tiers.toml must say input_shape"),
        ("classes = 10\n[tiers]", [], "there are no tiers"),
        (GOOD, ["--cuts", "1,4"], "cut 4 is outside the model"),
        (GOOD, ["--cuts", "1-3"], "--cuts '1-3' must be numbers with commas"),
        (GOOD, ["--picture", "plan.jpg"], "the name must end in .png"),
        (GOOD, ["--picture", "/nowhere/plan.png"], "there is no such folder"),
    ],
)
def test_mistakes(
    content: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(content)
    assert message in refusal(["plan", BUILD, "--tiers", str(path), *more], capsys)


def test_mistakes_about_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiers.toml").write_text(GOOD)
    tiers = ["--tiers", str(tmp_path / "tiers.toml")]
    assert "there is no model 'nonsense'" in refusal(["plan", "nonsense", *tiers], capsys)
    assert "cannot import" in refusal(["plan", "no.such:thing", *tiers], capsys)
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    assert "safetensors" in refusal(["plan", str(folder), *tiers], capsys)


def test_measuring_imports_no_torch(bundles: BundleIndex) -> None:
    code = (
        "import sys; from edge_sdk.runtime import measure; "
        f"measure.main([{str(bundles.folder)!r}, 'small', '--steps=1']); "
        "assert not {'torch', 'onnx', 'export', 'server_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == {"step_s", "memory_bytes", "process_bytes"}


def test_memory_grows_with_the_batch(bundles: BundleIndex) -> None:
    small, large = (measure_apart(bundles.folder, "large", batch, steps=2) for batch in (8, 4096))
    floats = 6 * 8 * 8  # one activation of the first block
    assert large.memory_bytes - small.memory_bytes > 4 * 4096 * floats
    assert large.step_s > small.step_s


def test_the_command_that_measures(bundles: BundleIndex) -> None:
    arguments = ["measure", str(bundles.folder), "medium", "--batch", "3", "--steps", "2"]
    result = CliRunner().invoke(bundle, [*arguments, "--json"])
    found = json.loads(result.stdout)
    assert 0 < found["memory_bytes"] < found["process_bytes"]
    assert found["step_s"] > 0
    plain = CliRunner().invoke(bundle, arguments)
    assert plain.exit_code == 0


def test_mistakes_in_measuring(bundles: BundleIndex, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no tier 'huge'; it has small, medium, large"):
        measure_apart(bundles.folder, "huge")
    with pytest.raises(ConfigError, match="must be numbers"):
        parse_cuts("")
    with pytest.raises(BundleError, match="no bundles in"):
        measure_apart(tmp_path, "small")
