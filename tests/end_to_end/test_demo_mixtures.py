"""``cutlayer demo --mix``: device processes train base networks, then a device mixes them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from edge_sdk.inference.mixture import Mixture
from export.formats.ship import Choice, ship
from server_hub.demo.demo_mixtures import ROBUSTNESS, MixtureDemo
from server_hub.demo.runner import run_demo
from server_hub.storage.trained_run import TrainedRun

pytestmark = pytest.mark.slow


def test_bases_are_trained_by_processes_and_mixed_on_a_device(tmp_path: Path) -> None:
    """Two rounds teach little; the test checks that all parts work together."""
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    folder = tmp_path / "run"
    result = run_demo(MixtureDemo(rounds=2, mixed=(1, 3)), folder, console)
    rows = {(row["bases"], row["lambda"]): row for row in result["rows"]}
    assert list(rows) == [(bases, robust) for bases in (1, 3) for robust in ROBUSTNESS]
    for row in rows.values():
        assert 0 <= row["robust_accuracy"] <= row["clean_accuracy"] + 0.05 <= 1.05
        assert row["latency_ms"] > 0
        assert 20 < row["rss_mb"] < 400
    assert result["rounds"] == 2
    assert result["choices"]["the same phone at 15 %"]["bases"] == 1
    assert result["choices"]["a camera in the rain"]["robustness"] == 0.5
    assert "*Attacked*: adversarial examples" in (folder / "report.md").read_text("utf-8")
    trained = TrainedRun.read(folder).trained(None, None, None, whole=True)
    card = ship(trained, Choice(["bundles", "onnx"], max_loss=1), tmp_path / "shipped")
    assert card.files[1].scores["aux.3"] == pytest.approx(rows[1, 0.0]["clean_accuracy"], abs=0.3)
    assert len(Mixture.open(tmp_path / "shipped" / "bundles", "large").held) == 8
