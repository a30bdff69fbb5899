"""The benchmark of connections, with few of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.connections import main


@pytest.mark.slow
def test_a_few_devices_are_measured(tmp_path: Path) -> None:
    main(devices=12, tokens=40, json_file=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["devices"], figures["tokens"]) == (12, 40)
    assert 0 < figures["back_half_s"] <= figures["back_all_s"] < 30
    assert 0 < figures["hello_ms"] <= figures["hello_p99_ms"]
