"""Long messages on slow links: they take the time that the link needs, also if it breaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.slow_link import Case, main, run
from server_hub.gateway.limits import Limits


def test_an_update_arrives_over_a_slow_link_that_breaks() -> None:
    """1 MB at 500 kB/s, with three breaks: after each, only what was under way is sent again."""
    (result,) = run(1.0, (Case("update", 500e3, breaks=3),))
    assert result.needed_s == pytest.approx(2.0, rel=0.05)
    assert result.taken_s < 3.5
    assert result.sent < 1.5


def test_a_tensor_larger_than_a_frame_travels() -> None:
    limits = Limits(max_frame=2**17, blob_piece=2**16)
    (result,) = run(1.0, (Case("update", 20e6),), limits)
    assert result.bytes > 7 * limits.max_frame
    assert result.sent < 1.1


def test_a_download_uses_the_link_in_spite_of_long_round_trips() -> None:
    (result,) = run(4.0, (Case("download", 2e6, round_trip_s=0.1),))
    assert result.share > 0.7


@pytest.mark.slow
def test_the_targets() -> None:
    """A fifth of the benchmark: 4 MB at 100 kB/s take about 40 s, 10 % more with two breaks."""
    updates = (Case("update", 100e3), Case("update", 100e3, round_trip_s=0.1, breaks=2))
    for result in run(4.0, updates):
        assert result.taken_s <= 1.1 * result.needed_s, result
    (download,) = run(20.0, (Case("download", 10e6, round_trip_s=0.1),))
    assert download.share >= 0.8


@pytest.mark.slow
def test_the_benchmark_writes_its_figures(tmp_path: Path) -> None:
    main(mb=0.1, json_file=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["what"] for row in figures} == {"update", "download"}
    assert all(row["taken_s"] > 0 for row in figures)
