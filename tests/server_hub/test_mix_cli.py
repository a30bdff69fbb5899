"""``cutlayer mix``: trained bases in bundles that answer without a hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.signing import new_key, read_private_key, sign_folder
from edge_sdk.cli.main import main
from edge_sdk.errors import BundleError
from edge_sdk.inference.mixture import Mixture
from export.bundles.model_source import model_of
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import WEIGHTS, SplitModel
from server_hub.storage.run_folder import RoundRecord, RunFolder
from tests.lib.commands import refusal
from tests.lib.mixture_files import MODEL, tiers_toml
from tests.lib.mixture_models import CLASSES, FEATURES, made

ORDER = [2, 0, 3, 1]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of four bases with dual norms, for ONNX."""
    folder = tmp_path_factory.mktemp("mix")
    tiers = tiers_toml(folder, "bases = 4\ndual_norms = true")
    main_quietly("export", MODEL, "--tiers", str(tiers), "--out", str(folder / "bundles"))
    return folder / "bundles"


def main_quietly(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def write_run(folder: Path, bundles: Path, order: list[int]) -> list[SplitModel]:
    """Write a finished run with some bases; return these, best first."""
    index = BundleIndex.read(bundles)
    run = RunFolder(folder)
    record = RoundRecord(1, 0.0, 0.0, 1, {}, None, None, None, 0, {}, {}, order=order)
    run.add(record)
    run.write()
    models = {}
    for base in sorted(order):
        model = model_of(index.model, index.extra, None)
        model.load(bundles / WEIGHTS)
        generator = torch.Generator().manual_seed(base)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        run.save_model({n: t.detach().numpy() for n, t in model.tensors().items()}, f"base-{base}")
        models[base] = model.eval()
    return [models[base] for base in order]


@pytest.fixture
def run(tmp_path: Path, bundles: Path) -> Path:
    write_run(tmp_path / "run", bundles, ORDER)
    return tmp_path / "run"


def mixed(run: Path, bundles: Path, out: Path) -> None:
    main_quietly("mix", str(run), "--bundles", str(bundles), "--out", str(out))


def test_the_best_bases_are_mixed_without_a_hub(tmp_path: Path, bundles: Path) -> None:
    models = write_run(tmp_path / "run", bundles, ORDER)
    mixed(tmp_path / "run", bundles, tmp_path / "out")
    mix = Mixture.open(tmp_path / "out", "small")
    x = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    for bases in range(1, 5):
        with torch.no_grad():
            answers = []
            for model in models[:bases]:
                h = model.stem(torch.from_numpy(x))
                for block in model.block:
                    h = block(h)
                answers.append(model.answer(2, h))
        found = mix.answer(x, bases).logits[-1]
        np.testing.assert_allclose(found, torch.stack(answers).mean(0), rtol=1e-4, atol=1e-5)


def test_a_bundle_of_trained_bases_can_be_signed(tmp_path: Path, run: Path, bundles: Path) -> None:
    mixed(run, bundles, tmp_path / "out")
    mine, other = (new_key(tmp_path / name) for name in ("mine", "other"))
    with pytest.raises(BundleError, match="not signed"):
        Mixture.open(tmp_path / "out", "small", trust=[mine])
    sign_folder(tmp_path / "out", read_private_key(tmp_path / "mine"))
    assert Mixture.open(tmp_path / "out", "small", trust=[mine]).held == [0, 1, 2, 3]
    with pytest.raises(BundleError):
        Mixture.open(tmp_path / "out", "small", trust=[other])


def test_bundles_that_are_not_of_trained_bases_are_told(bundles: Path) -> None:
    with pytest.raises(BundleError, match="holds no trained bases; write one with cutlayer mix"):
        Mixture.open(bundles, "small")
    with pytest.raises(BundleError, match=r"no tier 'large' in .*; it has small"):
        Mixture.open(bundles, "large")


def test_what_is_no_run_of_these_bundles_is_refused(
    tmp_path: Path, run: Path, bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def said(folder: Path) -> str:
        line = refusal(capsys, "mix", str(folder), "--bundles", str(bundles), "--out", str(out))
        assert not out.exists()
        return line

    assert "it has no metrics.jsonl" in said(tmp_path / "nowhere")
    plain = RunFolder(tmp_path / "plain")
    plain.add(RoundRecord(1, 0.0, 0.0, 1, {}, None, None, None, 0, {}, {}))
    plain.write()
    assert "has no base networks" in said(tmp_path / "plain")
    write_run(tmp_path / "fewer", bundles, [1, 0])
    assert "has 2 bases, and the bundle of tier 'small' is for 4" in said(tmp_path / "fewer")
    (run / "model.base-3.safetensors").write_bytes(b"nothing")
    assert "cannot read the base" in said(run)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_earlier_folder_is_replaced_only_when_asked_to(
    tmp_path: Path, run: Path, bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    mixed(run, bundles, out)
    arguments = "mix", str(run), "--bundles", str(bundles), "--out", str(out)
    assert "exists; choose another folder" in refusal(capsys, *arguments)
    main_quietly(*arguments, "--overwrite")


def test_tiers_that_are_alike_have_the_same_graphs(tmp_path: Path) -> None:
    model = made(2).bases
    tier = Tier(2, runtime="torch", bases=2)
    index = export_bundles(
        model.hub, {"a": tier, "b": tier}, tmp_path / "bundles", bases=model,
        example=torch.zeros(4, FEATURES), classes=CLASSES, verified=False,
    )  # fmt: skip
    first, second = index.manifest("a"), index.manifest("b")
    assert (first.tier, second.tier) == ("a", "b")
    assert replace(first, tier="b") == second
