"""The reports of benchmarks: figures by hand, verdicts, and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import methods, splitft, splitft_report
from benchmarks.pages import put_between
from edge_sdk.errors import ConfigError
from server_hub.methods.registry import simulated_methods
from server_hub.simulation.job import Job, methods_of
from server_hub.simulation.workers import Cell
from server_hub.storage.run_folder import RoundRecord

FIVE = splitft_report.Setting(splitft_report.ADAPTIVE, "iid", 8, 5)


def run_of(
    setting: splitft_report.Setting, seed: int, curve: Sequence[tuple[float, float]], equal: int
) -> splitft_report.Run:
    """Return a run with this perplexity at these times."""
    job = replace(Job.read(splitft.JOB), seed=seed)
    records = [
        RoundRecord(
            round=i + 1, clock=clock, seconds=1.0, devices=5, dropped={}, local_loss=None,
            local_accuracy=None, trunk_loss=1.0, trunk_steps=5,
            accuracy={tier: {"through_hub": value} for tier in job.tiers},
            bytes={"activations": {"up": 1000, "down": 0}, "gradient": {"up": 0, "down": 500}},
            costs={"trunk_flop": 1e9 * (i + 1)}, cuts={}, moves=[],
        )
        for i, (clock, value) in enumerate(curve)
    ]  # fmt: skip
    return splitft_report.Run(setting, job, equal, records)


def test_times_are_to_the_fixed_cuts_best_at_equal_samples_seed_by_seed() -> None:
    """Rounds beyond equal samples count for the time, but not for the perplexity to reach."""
    fixed = replace(FIVE, policy=splitft_report.START)
    runs = {
        (fixed, 0): run_of(fixed, 0, [(10, 9.0), (20, 8.0), (30, 7.0)], equal=2),
        (FIVE, 0): run_of(FIVE, 0, [(6, 9.5), (12, 8.5), (18, 7.9)], equal=2),
        (fixed, 1): run_of(fixed, 1, [(10, 9.0), (20, 8.5)], equal=2),
        (FIVE, 1): run_of(FIVE, 1, [(6, 9.5), (12, 9.0), (18, 8.9)], equal=2),
    }
    assert splitft_report.times_to_fixed(runs, FIVE) == [(18, 20), (None, 20)]
    assert "reached with 1 of 2 seeds" in splitft_report.time_verdict(runs)
    assert "**not met**" in splitft_report.time_verdict(runs)
    del runs[fixed, 1], runs[FIVE, 1]
    assert "90%" in splitft_report.time_verdict(runs)
    assert "**not met**" in splitft_report.time_verdict(runs)
    runs[FIVE, 0] = run_of(FIVE, 0, [(6, 9.5), (12, 7.9)], equal=2)
    assert "**met** (iid, rank 8, 5 clients: 60%)" in splitft_report.time_verdict(runs)
    run = runs[fixed, 0]
    assert run.best == (20, 8.0)
    assert run.megabytes("activations") == pytest.approx(1e-3)
    assert run.megabytes() == pytest.approx(1.5e-3)


def test_the_distance_from_centralized_training_is_of_means() -> None:
    """(8.1 + 8.3) / 2 is 2.5 % more than 8."""
    central = splitft_report.Setting(splitft_report.CENTRALIZED, "iid", 16, 5)
    runs = {
        (central, 0): run_of(central, 0, [(1, 8.0)], equal=1),
        (FIVE, 0): run_of(FIVE, 0, [(1, 8.1)], equal=1),
        (FIVE, 1): run_of(FIVE, 1, [(1, 8.3)], equal=1),
    }
    assert "**not met** (iid, rank 8, 5 clients: +2.5%)" in splitft_report.centralized_verdict(runs)
    assert "not measured yet" in splitft_report.centralized_verdict({(FIVE, 0): runs[FIVE, 0]})


def test_cells_differ_in_what_their_setting_says(tmp_path: Path) -> None:
    """Every setting is another job in another folder; those compared with each other share all
    but the cuts."""
    job = Job.read(splitft.JOB)
    cells = [s.cell(job, seed, tmp_path) for s in splitft_report.SETTINGS for seed in (0, 1)]
    assert len({cell.folder for cell in cells}) == len(cells)
    fixed: Cell = replace(FIVE, policy="cut 4").cell(job, 3, tmp_path)
    assert {tier.cut for tier in fixed.job.tiers.values()} == {4}
    assert fixed.job.cuts.policy == "fixed"
    adaptive = FIVE.cell(job, 3, tmp_path)
    assert adaptive.job.cuts.options == splitft_report.OPTIONS
    assert adaptive.job.local == fixed.job.local
    assert adaptive.job.trunk == fixed.job.trunk
    assert replace(FIVE, clients=20).cell(job, 0, tmp_path).job.clients == 20


def test_the_comparison_names_methods_that_there_are() -> None:
    """It has all eleven methods; another benchmark has the methods of language models."""
    names = methods_of(methods.METHODS)
    assert len(names) == 11
    assert set(names) < set(simulated_methods())
    assert Job.read(methods.JOB).method in simulated_methods()


def test_a_page_keeps_what_is_around_the_marks(tmp_path: Path) -> None:
    """A page without the marks is not changed."""
    page = tmp_path / "results.md"
    page.write_text("a\n<!-- x: begin -->old<!-- x: end -->\nb <!-- y: begin -->")
    put_between(page, "x", "new")
    assert page.read_text() == (
        "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb <!-- y: begin -->"
    )
    for name in ("y", "z"):
        with pytest.raises(ConfigError, match=f"has no marks <!-- {name}: begin"):
            put_between(page, name, "lost")
    assert "new" in page.read_text()
