"""The demo with digits: real processes over real WebSockets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from server_hub.demo.demo_digits import DigitsDemo
from server_hub.demo.runner import run_demo
from tests.lib.harness import cutlayer, finish


@pytest.mark.slow
def test_all_parts_of_the_demo_fit_together(tmp_path: Path) -> None:
    """Two rounds teach little, but all parts of the result exist."""
    shown = io.StringIO()
    result = run_demo(DigitsDemo(rounds=2), tmp_path / "run", Console(file=shown, width=120))
    assert {name: tier["cut"] for name, tier in result["tiers"].items()} == {
        "small": 1,
        "medium": 3,
        "large": 5,
    }
    for tier in result["tiers"].values():
        assert 0 < tier["ensemble"] <= 1
        assert tier["through_hub"] == pytest.approx(result["saved_model"], abs=0.02)
    assert result["rounds"] == 2
    assert 20 < result["device_rss_mb"] < 250
    for kind, way in (("activations", "up"), ("update", "up"), ("blob", "down"), ("infer", "up")):
        assert result["bytes"][kind][way] > 0
    assert "Accuracy on held-out digits" in shown.getvalue()
    assert "Accuracy on what devices keep back" in shown.getvalue()
    assert "6 of 6 devices that were asked" in (tmp_path / "run" / "report.md").read_text("utf-8")
    for name in ("report.md", "metrics.jsonl", "curves.png", "model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 500


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """The demo as users run it: each tier's ensemble is accurate, and better than devices alone."""
    code, out, err = finish(
        cutlayer("demo", "--run", str(tmp_path / "run"), "--json", str(tmp_path / "demo.json")), 280
    )
    assert code == 0, err
    result = json.loads((tmp_path / "demo.json").read_text())
    assert {t: v["cut"] for t, v in result["tiers"].items()} == {
        "small": 1,
        "medium": 3,
        "large": 5,
    }
    for tier in result["tiers"].values():
        assert tier["ensemble"] >= 0.95
        assert tier["ensemble"] > result["no_hub"]
        assert tier["through_hub"] == pytest.approx(result["saved_model"], abs=0.02)
    assert result["rounds"] == 40
    assert result["seconds"] < 180
    assert 20 < result["device_rss_mb"] < 250
    for kind, way in (("activations", "up"), ("update", "up"), ("blob", "down"), ("infer", "up")):
        assert result["bytes"][kind][way] > 0
    assert "Accuracy on held-out digits" in out
    for name in ("report.md", "metrics.jsonl", "curves.png", "model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
