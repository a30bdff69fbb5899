"""Comparisons: rows and means against hand calculation, and runs in processes that resume."""

from __future__ import annotations

import json
import multiprocessing as mp
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_sdk.errors import ConfigError, CutlayerError, DataError
from export.errors import ExportError
from server_hub.methods.settings import LocalTraining
from server_hub.reports.comparison import accuracy_table, cost_table
from server_hub.reports.values import three_digits
from server_hub.simulation.compare import cells_of, compare
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.partition import PartitionTable
from server_hub.simulation.results import (
    ROW_KEYS,
    common_target,
    curves,
    fleet_accuracy,
    partition_name,
    rows_of,
    summary,
    write_comparison,
)
from server_hub.simulation.simulate import Simulation
from server_hub.simulation.workers import CellFailed
from server_hub.storage.run_folder import METRICS, RoundRecord
from tests.lib.models import BUILD

Accuracy = Mapping[str, Mapping[str, float]]


def job(**changes: Any) -> Job:
    """Return a job of four devices of two tiers, 160 digits, and two rounds."""
    settings: dict[str, Any] = {
        "model": BUILD,
        "data": DataTable("digits", train=160, test=60),
        "tiers": {
            "small": FleetTier(clients=3, cut=1, gflops=0.01, uplink_mbit=1, latency_ms=20),
            "large": FleetTier(clients=1, cut=3),
        },
        "rounds": RoundsTable(count=2),
        "local": LocalTraining(batch_size=8),
    }
    return Job(**settings | changes)


def record(
    number: int, accuracy: Accuracy, seconds: float = 10.0, megabyte: float = 1.0
) -> RoundRecord:
    """Return a round of two devices, one of which was dropped, with the same costs as others."""
    size = round(number * megabyte * 1e6)
    return RoundRecord(
        round=number,
        clock=seconds * number,
        seconds=seconds,
        devices=1,
        dropped={"small-1": "vanished"},
        local_loss=1.0,
        local_accuracy=0.5,
        trunk_loss=None,
        trunk_steps=0,
        accuracy={tier: dict(paths) for tier, paths in accuracy.items()},
        bytes={
            "activations": {"up": 4 * size, "down": 0},
            "blob": {"up": 0, "down": 2 * size},
            "hello": {"up": size // 1000, "down": 0},
            "round": {"up": 0, "down": size // 1000},
        },
        costs={"wall_s": 1.0, "seconds": 1.0, "device_flop": 3e9 * number, "trunk_flop": 0.0},
    )


def both(alone: float, best: float) -> Accuracy:
    """Return accuracies: ``alone`` and ``best`` for three small devices, 0.5 for a large one."""
    return {
        "small": {"device_alone": alone, "ensemble": best},
        "large": {"device_alone": 0.5, "ensemble": 0.25},
    }


def alike(value: float) -> Accuracy:
    return {"small": {"device_alone": value}, "large": {"device_alone": value}}


SPLIT = {  # fleet accuracy: 0.35, 0.5, 0.65 with seed 0; 0.425, 0.65, 0.725 with seed 1
    0: [record(1, both(0.1, 0.3)), record(2, both(0.2, 0.5)), record(3, both(0.4, 0.7))],
    1: [record(1, both(0.4, 0.1)), record(2, both(0.7, 0.6)), record(3, both(0.5, 0.8))],
}
POOR = {  # means: 0.3, 0.6, 0.55
    0: [record(1, alike(0.2), 20, 0.5), record(2, alike(0.7), 20, 0.5), record(3, alike(0.5), 20)],
    1: [record(1, alike(0.4), 40, 0.5), record(2, alike(0.5), 40, 0.5), record(3, alike(0.6), 40)],
}
RUNS = {
    (method, seed): (replace(job(), method=method, seed=seed), records)
    for method, runs in (("fedsplitx", SPLIT), ("exc", POOR))
    for seed, records in runs.items()
}


# --- rows -----------------------------------------------------------------------------------------


def test_rows_hold_the_last_accuracy_and_the_cost_up_to_the_end() -> None:
    task = job(seed=5, data=DataTable("folder/some.data.npz"))
    rows = rows_of("exc", task, [*SPLIT[0], record(4, {})])  # the last round was not measured
    assert all(tuple(row) == ROW_KEYS for row in rows)
    common = {
        "method": "exc", "seed": 5, "data": "some.data", "partition": "iid",
        "up_bytes": 16_004_000, "down_bytes": 8_004_000, "sim_seconds": 40.0, "rounds": 4,
    }  # fmt: skip
    assert rows == [
        common | {"tier": tier, "path": path, "accuracy": accuracy}
        for tier, path, accuracy in (
            ("small", "device_alone", 0.4),
            ("small", "ensemble", 0.7),
            ("large", "device_alone", 0.5),
            ("large", "ensemble", 0.25),
        )
    ]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (PartitionTable(), "iid"),
        (PartitionTable("dirichlet", alpha=0.3), "dirichlet 0.3"),
        (PartitionTable("shards", classes_per_client=2), "shards 2"),
        (PartitionTable("length", alpha=10), "length 10"),
        (PartitionTable("domain"), "domain"),
    ],
)
def test_partitions_are_named_with_what_makes_them(table: PartitionTable, name: str) -> None:
    assert partition_name(job(partition=table)) == name


def test_a_run_that_was_never_measured_is_told_with_its_name() -> None:
    runs = {("exc", 3): (job(seed=3), [record(1, {})])}
    for asked in (lambda: rows_of("exc", *runs["exc", 3]), lambda: summary(runs)):
        with pytest.raises(ConfigError, match="'exc' with seed 3"):
            asked()


# --- means ----------------------------------------------------------------------------------------


def test_the_fleets_accuracy_is_that_of_its_clients_in_their_best_way() -> None:
    # Three small devices at 0.7, and a large one at 0.5.
    assert fleet_accuracy(job(), both(0.4, 0.7)) == pytest.approx((3 * 0.7 + 0.5) / 4)
    assert fleet_accuracy(job(), {"server": {"device_alone": 0.9}}) == 0.9


def test_curves_are_means_over_the_seeds_with_the_worst_and_the_best() -> None:
    found = curves(RUNS)
    assert [p.round for p in found["fedsplitx"]] == [1, 2, 3]
    middle = found["fedsplitx"][1]
    # seed 0: (3 x 0.5 + 0.5) / 4; seed 1: (3 x 0.7 + 0.5) / 4
    assert (middle.low, middle.high) == pytest.approx((0.5, 0.65))
    assert middle.accuracy == pytest.approx(0.575)
    assert middle.megabytes == pytest.approx(2 * 6.002)
    assert [p.seconds for p in found["exc"]] == [30, 60, 90]  # 20 and 40 s per round
    assert [p.accuracy for p in found["exc"]] == pytest.approx([0.3, 0.6, 0.55])


def test_a_round_that_one_seed_has_not_measured_is_not_in_the_curve() -> None:
    records = [replace(r, accuracy={}) if r.round == 2 else r for r in SPLIT[1]]
    runs = RUNS | {("fedsplitx", 1): (RUNS["fedsplitx", 1][0], records)}
    assert [p.round for p in curves(runs)["fedsplitx"]] == [1, 3]


def test_scores_have_mean_and_deviation_and_equal_tiers_are_one_line() -> None:
    found = {(s.method, s.tier, s.path): (s.mean, s.deviation) for s in summary(RUNS).scores}
    root = 2**-0.5  # the deviation of two values is their distance over the root of two
    assert set(found) == {
        ("fedsplitx", "small", "device_alone"),
        ("fedsplitx", "small", "ensemble"),
        ("fedsplitx", "large", "device_alone"),
        ("fedsplitx", "large", "ensemble"),
        ("exc", "all", "device_alone"),
    }
    assert found["fedsplitx", "small", "device_alone"] == pytest.approx((0.45, 0.1 * root))
    assert found["fedsplitx", "small", "ensemble"] == pytest.approx((0.75, 0.1 * root))
    assert found["fedsplitx", "large", "ensemble"] == pytest.approx((0.25, 0))
    assert found["exc", "all", "device_alone"] == pytest.approx((0.55, 0.1 * root))


def test_one_seed_has_no_deviation_and_one_tier_keeps_its_name() -> None:
    runs = {("centralized", 0): (job(), [record(1, {"server": {"device_alone": 0.9}})])}
    (score,) = summary(runs).scores
    assert (score.tier, score.mean, score.deviation) == ("server", 0.9, None)


def test_costs_are_means_over_the_seeds() -> None:
    split, poor = summary(RUNS).costs
    assert split.megabytes == pytest.approx(
        {"activations": 12, "gradient": 0, "update": 0, "blob": 6, "other": 0.006}
    )
    assert (split.up, split.down) == pytest.approx((12.003, 6.003))
    assert split.seconds == 30
    assert split.device_gflop == pytest.approx(9 / 6)  # 3 rounds of 2 devices, 9 GFLOP
    assert poor.seconds == 90


def test_the_target_is_what_every_method_reaches() -> None:
    assert common_target(RUNS) == pytest.approx(0.6)  # exc's best mean is that of its second round
    split, poor = summary(RUNS).costs
    assert (split.target_s, poor.target_s) == (30, 60)


@pytest.mark.parametrize(
    ("target", "split_s", "poor_s"), [(0.3, 10, 30), (0.5, 20, 60), (0.65, 30, None)]
)
def test_time_until_a_target_is_that_of_the_first_measured_round_that_has_it(
    target: float, split_s: float | None, poor_s: float | None
) -> None:
    split, poor = summary(RUNS, target).costs
    assert (split.target_s, poor.target_s) == (split_s, poor_s)


# --- tables ---------------------------------------------------------------------------------------


def test_the_accuracy_table_has_a_line_per_tier_and_a_column_per_way_to_answer() -> None:
    table = accuracy_table(summary(RUNS))
    assert table.header == ["method", "tier", "device alone", "ensemble"]
    assert table.rows == [
        ["fedsplitx", "small", "45.0 ± 7.1", "75.0 ± 7.1"],
        ["", "large", "50.0 ± 0.0", "25.0 ± 0.0"],
        ["exc", "all", "55.0 ± 7.1", ""],
    ]


def test_the_cost_table_leaves_out_kinds_that_nobody_sends() -> None:
    table = cost_table(summary(RUNS, 0.65))
    assert table.header == [
        "method", "activations", "models", "other", "up", "down", "GFLOP", "job, s", "65.0%, s",
    ]  # fmt: skip
    assert table.rows == [
        ["fedsplitx", "12.0", "6.00", "0.006", "12.0", "6.00", "1.50", "30.0", "30.0"],
        ["exc", "12.0", "6.00", "0.006", "12.0", "6.00", "1.50", "90.0", "-"],
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (99.97, "100.0"), (1234.5, "1234")],
)
def test_figures_have_some_three_digits(value: float, shown: str) -> None:
    assert three_digits(value) == shown


def test_tables_are_shown_in_the_terminal() -> None:
    console = Console(width=100)
    with console.capture() as shown:
        console.print(accuracy_table(summary(RUNS)).rich(), cost_table(summary(RUNS, 0.99)).rich())
    text = shown.get()
    for whole in ("75.0 ± 7.1", "fedsplitx", "activations", "99.0%,"):
        assert whole in text


def test_a_comparison_is_written_with_a_row_a_line(tmp_path: Path) -> None:
    write_comparison(tmp_path / "new", RUNS)
    text = (tmp_path / "new" / "results.json").read_text()
    rows = json.loads(text)
    assert rows == [row for (method, _), run in RUNS.items() for row in rows_of(method, *run)]
    lines = text.splitlines()
    assert len(lines) == len(rows) + 2
    assert json.loads(lines[1].rstrip(",")) == rows[0]
    report = (tmp_path / "new" / "report.md").read_text()
    assert "| exc | all | 55.0 ± 7.1 |  |" in report
    assert "(comparison.png)" in report
    assert (tmp_path / "new" / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_comparison_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot write to"):
        write_comparison(tmp_path / "file", RUNS)


# --- processes ------------------------------------------------------------------------------------

METHODS, SEEDS = ["exc", "fedavg"], [0, 1]


class Seen:
    """For ``on_progress``: records the calls; interrupts after a number of rounds."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.told: list[tuple[int, int, list[str]]] = []
        self._interrupt_at = interrupt_at

    def __call__(self, done: int, total: int, running: list[str]) -> None:
        self.told.append((done, total, running))
        if self._interrupt_at is not None and done >= self._interrupt_at:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_to_the_rows_of_runs_on_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = {}
    for cell in cells_of(job(), METHODS, SEEDS, tmp_path / "alone"):
        with Simulation(cell.job, cell.folder) as simulation:
            wanted[cell.job.method, cell.job.seed] = simulation.run()

    folder = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):  # the first run is finished, the last not begun
        compare(job(), METHODS, SEEDS, folder, on_progress=Seen(interrupt_at=3))
    assert not mp.active_children()
    assert not list(tmp_path.glob("cutlayer-*"))
    cells = cells_of(job(), METHODS, SEEDS, folder)
    done = [cell.rounds_done() for cell in cells]
    assert (done[0], done[-1]) == (2, 0)
    written = (cells[0].folder / METRICS).stat().st_mtime_ns

    seen = Seen()
    runs = compare(job(), METHODS, SEEDS, folder, jobs=2, on_progress=seen)
    assert list(runs) == [("exc", 0), ("exc", 1), ("fedavg", 0), ("fedavg", 1)] == list(wanted)
    for cell, before in zip(cells, done, strict=True):
        key = cell.job.method, cell.job.seed
        rows, whole = (rows_of(key[0], cell.job, found[key]) for found in (runs, wanted))
        if before == 1:  # its devices have joined twice, which takes time and traffic
            for row in (*rows, *whole):
                del row["up_bytes"], row["down_bytes"], row["sim_seconds"]
        assert rows == whole
    assert (cells[0].folder / METRICS).stat().st_mtime_ns == written  # it was only read
    assert seen.told[0][0] >= 2
    assert "exc, seed 0" not in {name for _, _, running in seen.told for name in running}
    assert max(len(running) for _, _, running in seen.told) == 2
    assert seen.told[-1] == (8, 8, [])
    assert (cells[-1].folder / "report.md").exists()

    again = Seen()
    assert compare(job(), METHODS, SEEDS, folder, on_progress=again) == runs
    assert again.told == [(8, 8, [])]


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    # No device is online for long enough to deliver an update.
    gone = {"small": FleetTier(clients=4, cut=1, gflops=1e-6, online_s=0.5, offline_s=0.5)}
    with pytest.raises(CellFailed, match=r"method 'fedavg' with seed 7 failed: .+"):
        compare(job(tiers=gone), ["fedavg"], [7], tmp_path)
    assert not mp.active_children()


@pytest.mark.parametrize(
    ("changes", "methods", "seeds", "error", "says"),
    [
        ({}, [], [0], ConfigError, "nothing to compare"),
        ({}, ["exc"], [], ConfigError, "nothing to compare"),
        ({}, ["exc"], [-1], ConfigError, "seed -1 is negative"),
        ({}, ["exc", "nosuch"], [0], ConfigError, "there is no method 'nosuch'"),
        ({}, ["exc", "fjord"], [0], ConfigError, "method 'fjord' does not fit this job: stem"),
        ({"data": DataTable("nowhere.npz")}, ["exc"], [0], DataError, "no data at"),
        ({"model": "nowhere:build"}, ["exc"], [0], ConfigError, "nowhere"),
        ({"tiers": {"a": FleetTier(clients=2, cut=99)}}, ["exc"], [0], ExportError, "99"),
        ({"tiers": {"a": FleetTier(clients=161, cut=1)}}, ["exc"], [0], ConfigError, "161 clients"),
        (
            {
                "partition": PartitionTable("dirichlet", alpha=0.001),
                "tiers": {"a": FleetTier(clients=30, cut=1)},
            },
            ["exc", "centralized"],
            [0, 1],
            ConfigError,
            "without rows",
        ),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    tmp_path: Path,
    changes: dict[str, Any],
    methods: list[str],
    seeds: list[int],
    error: type[CutlayerError],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        compare(job(**changes), methods, seeds, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_the_runs_of_another_job_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "exc" / "seed-0"
    other.mkdir(parents=True)
    (other / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="another job"):
        compare(job(), ["fedavg", "exc"], [0], tmp_path)
    assert not (tmp_path / "fedavg").exists()
