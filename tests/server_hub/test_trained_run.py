"""Reading what a run has trained, and ``cutlayer model export`` of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import BundleError, ConfigError, DataError
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import SplitModel
from server_hub.storage.run_folder import JOB, METRICS, JobDescription
from server_hub.storage.trained_run import TrainedRun
from tests.lib.commands import output, refusal
from tests.lib.harness import examples, save_npz
from tests.lib.models import BUILD, CLASSES, IMAGE, conv_model, example
from tests.lib.runs import changed, finished_run


def head_of(model: SplitModel, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(x).numpy()
    return logits


def test_a_run_is_known_by_what_it_says(bundles: BundleIndex, tmp_path: Path) -> None:
    """Method, rounds, tiers and held-out examples come from the run's own files."""
    held_out = tmp_path / "held_out.npz"
    save_npz(held_out, examples(12))
    model = changed(bundles, 0)
    folder = finished_run(tmp_path / "run", bundles.folder, {None: model}, held_out=held_out)
    trained = TrainedRun.read(folder).trained(None, None, None, whole=False)
    assert (trained.about["method"], trained.about["rounds"]) == ("FedSplitX", 3)
    assert trained.about["version"] == "0.0"  # that has trained it
    assert trained.about["tiers"] == {name: e.cut for name, e in bundles.tiers.items()}
    assert trained.about["measured_by_hub"][next(iter(bundles.tiers))] == {"device_alone": 0.5}
    assert trained.held_out is not None
    assert len(trained.held_out.x) == 12
    for name, tensor in model.tensors().items():
        assert torch.equal(trained.model.tensors()[name], tensor)
    assert set(trained.by_tier) == set(bundles.tiers)
    held_out.unlink()  # figures are then not measured, and nothing fails
    assert TrainedRun.read(folder).trained(None, None, None, whole=False).held_out is None


def test_a_running_job_gives_the_model_that_was_saved(bundles: BundleIndex, tmp_path: Path) -> None:
    """The record of the last round may not be written yet; the file itself says its round."""
    folder = finished_run(tmp_path / "run", bundles.folder, {None: changed(bundles, 0)}, rounds=7)
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(lines[:5]))
    assert TrainedRun.read(folder).trained(None, None, None, whole=False).about["rounds"] == 7
    (folder / METRICS).unlink()
    assert TrainedRun.read(folder).trained(None, None, None, whole=False).about["rounds"] == 7


def test_a_run_with_a_model_per_tier(bundles: BundleIndex, tmp_path: Path) -> None:
    """A tier must be chosen, but for bundles, which take the model of each."""
    models = {name: changed(bundles, seed) for seed, name in enumerate(bundles.tiers)}
    folder = finished_run(tmp_path / "run", bundles.folder, dict(models))
    run = TrainedRun.read(folder)
    with pytest.raises(ConfigError, match="has a model for each tier; choose --tier, one of"):
        run.trained(None, None, None, whole=False)
    with pytest.raises(ConfigError, match="has no tier 'huge'; its tiers are"):
        run.trained("huge", None, None, whole=False)
    found = run.trained(None, None, None, whole=True).by_tier
    for tier, model in models.items():
        chosen = run.trained(tier, None, None, whole=False).model
        for got in (chosen, found[tier]):
            tensors = got.tensors()
            assert all(torch.equal(tensors[name], t) for name, t in model.tensors().items())


def test_the_command_writes_what_it_says(
    bundles: BundleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.npz"
    data = examples(40)
    save_npz(held_out, data)
    model = changed(bundles, 0)
    folder = finished_run(tmp_path / "run", bundles.folder, {None: model}, held_out=held_out)
    said = output(capsys, "model", "export", str(folder), "--out", str(tmp_path / "out"), "--json")
    card = json.loads(said)
    assert card["out"] == str(tmp_path / "out")
    assert card["examples"] == 40
    (file,) = card["files"]
    assert (file["path"], file["heads"][-1]) == ("model.onnx", "head")
    x = example(IMAGE, 3)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    want = {f"aux.{d}": model.answer(d, model.segment(x, d)) for d in model.head_depths}
    want["head"] = model(x)
    assert file["heads"] == list(want)
    for got, logits in zip(session.run(list(want), {"x": x.numpy()}), want.values(), strict=True):
        np.testing.assert_allclose(got, logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    accuracy = (head_of(model, torch.from_numpy(data.x)).argmax(1) == data.y).mean()
    assert file["scores"]["head"] == pytest.approx(accuracy)
    shown = output(
        capsys, "model", "export", str(folder), "--out", str(tmp_path / "out"), "--overwrite",
        "--tier", next(iter(bundles.tiers)),
    )  # fmt: skip
    assert "Trained model" in shown
    assert f"written to {tmp_path / 'out'}" in shown


def test_mistakes(bundles: BundleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one sentence that says what to do, and nothing is written."""
    folder = finished_run(tmp_path / "run", bundles.folder, {None: changed(bundles, 0)})

    def said(run: Path, *options: str) -> str:
        line = refusal(
            capsys, "model", "export", str(run), "--out", str(tmp_path / "out"), *options
        )
        assert not (tmp_path / "out").exists()
        return line

    assert "has no base networks; leave --bases out" in said(folder, "--bases", "2")
    assert "has no tier 'x'; its tiers are" in said(folder, "--tier", "x")
    assert "no data at" in said(folder, "--held-out", str(tmp_path / "none.npz"))
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, x=np.zeros((3, 5), np.float32), y=np.zeros(3, np.int64))
    assert "x has shape" in said(folder, "--held-out", str(wrong))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / JOB).write_text((folder / JOB).read_text())
    assert "has not completed a round yet" in said(empty)
    (folder / JOB).write_text("{}")
    assert "run.json is damaged" in said(folder)
    job = JobDescription("0", "m", tmp_path / "gone", None, None)
    (folder / JOB).write_text(json.dumps({**vars(job), "bundles": str(job.bundles)}))
    assert f"bundles are not in {tmp_path / 'gone'} any more; give --bundles" in said(folder)


def test_errors_are_of_the_kinds_that_are_told(bundles: BundleIndex, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", bundles.folder, {None: changed(bundles, 0)})
    with pytest.raises(BundleError, match="run cutlayer export first"):
        TrainedRun.read(folder, tmp_path)
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, x=np.zeros((3, 5), np.float32), y=np.zeros(3, np.int64))
    with pytest.raises(DataError, match="x has shape"):
        TrainedRun.read(folder).trained(None, None, wrong, whole=False)


def test_a_run_that_says_more_than_is_known_here_is_read(
    bundles: BundleIndex, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path / "run", bundles.folder, {None: changed(bundles, 0)})
    said = json.loads((folder / JOB).read_text())
    (folder / JOB).write_text(json.dumps({**said, "rounds": 20, "started_from": None}))
    assert JobDescription.read(folder) == JobDescription("0.0", "FedSplitX", bundles.folder,
                                                         BUILD, None)  # fmt: skip


def test_heads_read_channels_where_the_export_found_them(tmp_path: Path) -> None:
    """A head whose means are not pooled to a grid does not show it by its shape."""
    model, x = conv_model(), example((1, 2, 9), 8)
    index = export_bundles(
        model, {"a": Tier(2, runtime="torch")}, tmp_path / "bundles", example=x,
        classes=CLASSES, model_path=BUILD, verified=False,
    )  # fmt: skip
    folder = finished_run(tmp_path / "run", index.folder, {None: model})
    trained = TrainedRun.read(folder).trained(None, None, None, whole=False)
    want, got = (m.eval().answer(2, m.segment(x, 2)) for m in (model, trained.model))
    assert torch.equal(want, got)
