"""The plan measures the very bundles that an export with the same settings writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.cli.main import main
from edge_sdk.runtime.measure import Measurement, graphs_of_a_step, measure
from edge_sdk.training.adversarial import Attack
from export.bundles import writer
from export.bundles.tier_table import TiersConfig
from export.bundles.writer import Tier
from export.planning import measuring
from export.planning.flops import flops_per_row
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from tests.lib.models import BUILD
from tests.lib.plans import write_without_lowering

IMAGES = "input_shape = [1, 8, 8]\n"
TEXTS = 'length = 6\noptimizer = "adamw"\n'
BACKWARD = 'graphs = ["backward"]\n'
ADVERSARIAL = 'graphs = ["adversarial_train"]\n'
LORA = "[lora]\nrank = 2\n"
TIER = "[tiers.a]\ncut = 2\nbatch = 4\n"
OTHER = "[tiers.b]\ncut = 1\nbatch = 4\n"

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cut": (IMAGES + TIER + OTHER, {"cut": 2}),
    "codec": (IMAGES + TIER + 'codec = "fp16"\n' + OTHER, {"codec": "fp16"}),
    "runtime": (IMAGES + TIER + 'runtime = "executorch"\n', {"runtime": "executorch"}),
    "batch": (IMAGES + 'decay = "all"\n' + TIER, {"batch": 4}),
    "memory": (IMAGES + TIER + 'memory = "low"\n' + OTHER, {"memory": "low"}),
    "precision": (IMAGES + TIER + 'precision = "int8"\n' + OTHER, {"precision": "int8"}),
    "graphs": (IMAGES + BACKWARD + TIER + OTHER, {"graphs": {"activate", "backward"}}),
    "graphs: finish": (
        TEXTS + 'graphs = ["finish"]\n' + LORA + TIER + OTHER,
        {"graphs": {"activate", "backward", "finish"}},
    ),
    "graphs: fuse": (TEXTS + 'graphs = ["fuse"]\n' + LORA + TIER, {"graphs": {"activate", "fuse"}}),
    "cut_rank": (TEXTS + BACKWARD + LORA + "cut_rank = 1\n" + TIER + OTHER, {"cut_rank": 1}),
    "bases": (IMAGES + "bases = 2\n" + TIER + "[tiers.whole]\nbatch = 4\n" + OTHER, {"bases": 2}),
    "graphs: adversarial_train": (
        IMAGES + "bases = 2\ndual_norms = true\n" + TIER + ADVERSARIAL
        + "[tiers.whole]\nbatch = 4\n" + ADVERSARIAL + OTHER,
        {"bases": 2, "graphs": {"attack", "adversarial_train"}},
    ),
}  # fmt: skip
"""A ``tiers.toml`` for every field of a tier, with the values that its tier ``a`` then has.

Of the field ``graphs`` there is one for every family.
"""

LOWERED = ["runtime", "precision", "graphs: adversarial_train"]
"""Settings with which the files are compared as well; int8 weights are those of a lowered graph."""

REFUSED = {"distill"}
"""Fields of a tier that ``tiers.toml`` does not take."""


def test_every_setting_of_a_tier_is_carried_or_refused(tmp_path: Path) -> None:
    """A field that is added to ``Tier`` must be measured by the plan as well."""
    known = {field.name: field.default for field in fields(Tier)}
    assert known.keys() == {name.partition(":")[0] for name in SETTINGS} | REFUSED
    path = tmp_path / "tiers.toml"
    for name, (content, values) in SETTINGS.items():
        assert values[name.partition(":")[0]] != known[name.partition(":")[0]]
        path.write_text(content)
        tier = TiersConfig.read(path).at("a", 2)
        assert {n: asdict(tier)[n] for n in values} == values
    for name in REFUSED:
        for content in (f"{name} = 0.5\n{IMAGES}{TIER}", f"{IMAGES}{TIER}{name} = 0.5\n"):
            path.write_text(content)
            with pytest.raises(Exception, match=f"unknown key '{name}'"):
                TiersConfig.read(path)


@dataclass(frozen=True)
class Written:
    """What was written for a tier: its settings, its steps and its manifest."""

    tier: Tier
    steps: ClientSteps
    manifest: Manifest


def recorded(
    monkeypatch: pytest.MonkeyPatch, module: Any, *, lowered: bool = True
) -> list[Written]:
    """Record the bundles that a module writes; nothing is compared with PyTorch."""
    found: list[Written] = []
    original = module.write_tier if lowered else write_without_lowering

    def write(steps: ClientSteps, name: str, tier: Tier, *args: Any, **settings: Any) -> Manifest:
        manifest: Manifest = original(steps, name, tier, *args, **settings | {"verified": False})
        found.append(Written(tier, steps, replace(manifest, tier="")))
        return manifest

    monkeypatch.setattr(module, "write_tier", write)
    return found


def command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run ``cutlayer``, which must succeed; return the JSON that it prints."""
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    assert not end.value.code
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def model_for(setting: str, folder: Path) -> str:
    """Return the model to name in the commands: a tiny GPT-2 for texts."""
    if TEXTS not in SETTINGS[setting][0]:
        return BUILD
    pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return str(path)


def flops_of(steps: ClientSteps, length: int) -> dict[str, int]:
    """Return the FLOPs per example of every graph of a step."""
    known = {step.name: step for step in all_steps(steps)}
    return {name: int(flops_per_row(known[name], length)) for name in graphs_of_a_step(known)}


@pytest.mark.parametrize(
    ("setting", "lowered"),
    [
        *((setting, False) for setting in SETTINGS if setting != "precision"),
        *(pytest.param(setting, True, marks=pytest.mark.slow) for setting in LOWERED),
    ],
)
def test_the_plan_measures_what_an_export_writes(
    setting: str,
    lowered: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without lowering, manifests are compared whose graphs have all their inputs and outputs."""
    if setting == "runtime" and lowered:
        pytest.importorskip("executorch")
    content, _ = SETTINGS[setting]
    (tmp_path / "tiers.toml").write_text(content)
    model = model_for(setting, tmp_path)
    common = [model, "--tiers", str(tmp_path / "tiers.toml")]
    monkeypatch.setattr(measuring, "measure_apart", lambda *args: Measurement(0.5, 10, 20))
    planned = recorded(monkeypatch, measuring, lowered=lowered)
    plan = command(["plan", *common, "--cuts", "1,2"], capsys)
    data = []
    if setting == "precision":
        x = np.random.default_rng(0).standard_normal((20, 1, 8, 8), np.float32)
        np.savez(tmp_path / "data.npz", x=x, y=np.arange(20) % 10)
        data = ["--data", str(tmp_path / "data.npz"), "--allow-loss"]
    exported = recorded(monkeypatch, writer, lowered=lowered)
    index_folder = tmp_path / "out"
    command(["export", *common, "--out", str(index_folder), *data], capsys)
    index = BundleIndex.read(index_folder)
    assert plan["tiers"].keys() == index.tiers.keys()
    for name, entry in index.tiers.items():
        cost, manifest = plan["tiers"][name]["cost"], index.manifest(name)
        (own,) = [w for w in exported if w.manifest == replace(manifest, tier="")]
        settings = {**asdict(own.tier), "graphs": sorted(own.tier.graphs)}
        assert {n: cost[n] for n in settings} == settings
        assert plan["tiers"][name]["cut"] == entry.cut
        (plan_of,) = [w for w in planned if w.tier == own.tier and w.manifest == own.manifest]
        assert plan_of.steps.decayed == own.steps.decayed  # a constant of the graphs
        assert cost["bundle_bytes"] == sum(manifest.blobs.values())
        assert cost["update_bytes"] == sum(spec.nbytes() for spec in manifest.exchanged())
        parameters = [e.spec.nbytes() for e in manifest.state if e.kind == "parameter"]
        assert cost["parameters"] == sum(parameters) // 4
        assert cost["heads"] == [int(head.removeprefix("aux.")) for head in manifest.heads]
        assert cost["graph_flops"] == flops_of(own.steps, cost["tokens"])
        runs = graphs_of_a_step(manifest.graphs)
        assert cost["flops"] == sum(cost["graph_flops"][name] for name in runs)
        assert cost["activation_bytes"] == sent(manifest, cost["tokens"])


def sent(manifest: Manifest, length: int, batch: int = 4) -> float:
    """Return the bytes that a step sends, per token or example."""
    if manifest.whole:
        return 0
    parts = list(manifest.packed) + list(manifest.features)
    times = 2 if "adversarial_train" in manifest.graphs else 1
    total = sum(spec.nbytes(batch=batch, seq=length) for spec in parts)
    return times * total / (batch * length)


def test_the_graphs_of_a_step() -> None:
    """The special kind of training that the bundle was exported for is measured."""
    base = ("predict", "train", "forward")
    cases: Mapping[tuple[str, ...], tuple[str, ...]] = {
        (): ("train",),
        ("activate", "backward"): ("activate", "backward"),
        ("activate", "fuse"): ("activate", "fuse"),
        ("activate", "fuse", "backward"): ("activate", "fuse"),
        ("finish", "activate", "backward"): ("activate", "finish", "backward"),
        ("attack", "adversarial_train", "mix_1"): (
            *["attack"] * Attack().steps,
            "adversarial_train",
        ),
    }
    for added, wanted in cases.items():
        assert graphs_of_a_step({*base, *added}) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["finish", "fuse", "adversarial_train"])
def test_the_graphs_of_a_step_are_run(
    graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The figures are those of a whole step, in this process, with finite inputs of every kind."""
    setting = f"graphs: {graph}"
    (tmp_path / "tiers.toml").write_text(SETTINGS[setting][0])
    recorded(monkeypatch, writer)
    tiers = ["--tiers", str(tmp_path / "tiers.toml"), "--out", str(tmp_path / "out")]
    command(["export", model_for(setting, tmp_path), *tiers], capsys)
    found = measure(tmp_path / "out", "a", batch=3, length=5, steps=1)
    assert found.step_s > 0
