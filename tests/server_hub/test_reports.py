"""Rounds as tables, lines, logs and pictures; tables as Markdown; settings as TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from server_hub.demo.processes import to_toml
from server_hub.reports.report import write_report
from server_hub.reports.rounds import (
    mixture_table,
    move_lines,
    round_line,
    rounds_table,
    traffic_table,
)
from server_hub.reports.table import Table
from server_hub.reports.tensorboard import scalars
from server_hub.storage.run_folder import RunFolder
from tests.lib.records import record

MOVE = {"device": "phone-3", "cut": 4, "to": 2, "reason": "a round takes it 0.9 s, 0.4 s at cut 2"}


def test_the_line_of_a_round_has_the_metric_and_the_best_way_where_there_is_no_ensemble() -> None:
    line = round_line(record(1))
    assert "perplexity a 1234  b 40" in line or "perplexity a 1235  b 40" in line
    assert "%" not in line
    paths = {"device_alone": 20.0, "through_hub": 15.0}
    assert "perplexity a 15 " in round_line(record(1, accuracy={"a": paths}))
    classes = {"a": {"device_alone": 0.5, "through_hub": 0.9, "ensemble": 0.75}}
    line = round_line(record(1, accuracy=classes, metric="accuracy", local_loss=0.5))
    assert "loss 0.500  trunk loss 2.500  a 75.0%  1.0 s" in line
    assert "perplexity" not in round_line(record(1, accuracy={}))


def test_every_move_is_a_line() -> None:
    assert move_lines(record(1)) == []
    lines = move_lines(record(1, moves=[MOVE, {**MOVE, "device": "tv"}]))
    assert lines[0] == "phone-3 goes from cut 4 to 2: a round takes it 0.9 s, 0.4 s at cut 2"
    assert lines[1].startswith("tv goes")


def test_logs_are_named_after_the_metric_and_have_the_cuts() -> None:
    values = scalars(record(1))
    assert values["perplexity/b/through_hub"] == 40.0
    assert not any(name.startswith("accuracy/b") for name in values)
    assert (values["cut/phone-3"], values["cut/phone-20"]) == (4, 1)
    assert "accuracy/b/through_hub" in scalars(record(1, metric="accuracy"))


def test_a_report_has_the_moves_and_a_picture_of_the_cuts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "moved", metric="perplexity")
    run.add(record(1, moves=[MOVE]))
    run.write()
    run.add(record(2, cuts={"phone-3": 2}))
    run.write()
    write_report(run, "SplitFT")
    report = (tmp_path / "moved" / "report.md").read_text()
    assert f"| phone-3 | {MOVE['reason']} | 1 | 4 | 2 |" in report
    assert "](cuts.png)" in report
    assert (tmp_path / "moved" / "cuts.png").read_bytes().startswith(b"\x89PNG")
    still = RunFolder(tmp_path / "still", metric="perplexity")
    still.add(record(1))
    still.write()
    write_report(still, "SplitFT")
    assert "oves of cuts" not in (tmp_path / "still" / "report.md").read_text()
    assert not (tmp_path / "still" / "cuts.png").exists()


@pytest.mark.parametrize("devices", [1, 200])
def test_the_picture_of_the_cuts_takes_any_number_of_devices(tmp_path: Path, devices: int) -> None:
    run = RunFolder(tmp_path / "run", metric="perplexity")
    cuts = {f"phone-{i}": 1 + i % 4 for i in range(devices)}
    run.add(record(1, cuts=cuts, moves=[MOVE]))
    run.write()
    write_report(run, "SplitFT")
    assert (tmp_path / "run" / "cuts.png").stat().st_size > 1000


def test_the_table_of_rounds_shows_the_device_alone_and_the_best_path() -> None:
    """The table has the lowest perplexity or the highest accuracy, and cuts after a move."""
    paths = {"device_alone": 90.0, "through_hub": 30.25, "ensemble": 45.0}
    table = rounds_table([record(1, accuracy={"a": paths})])
    assert table.title == "Rounds: perplexity by tier, device alone/best path"
    (row,) = table.rows
    assert dict(zip(table.header, row, strict=True)) == {
        "round": "1", "s": "10.0", "devices": "2", "trunk loss": "2.500",
        "a": "90/30.25", "MB up": "0.0", "MB down": "0.0",
    }  # fmt: skip
    classes = {"a": {"device_alone": 0.5, "through_hub": 0.9, "ensemble": 0.75}}
    table = rounds_table([record(1, accuracy=classes, metric="accuracy")])
    assert "50.0/90.0" in table.rows[0]
    moved = rounds_table([record(1, moves=[MOVE]), record(2), record(3)], last=2)
    assert [row[0] for row in moved.rows] == ["2", "3"]
    assert moved.rows[0][moved.header.index("cuts")] == "4 1"


def test_a_table_of_base_networks_has_a_column_for_each_power_of_two() -> None:
    mixed = {str(n): 0.5 + n / 100 for n in range(1, 9)}
    one = record(1, mixed=mixed, order=[2, 1], metric="accuracy", accuracy={"a": {"mix": 0.58}})
    table = rounds_table([one])
    columns = dict(zip(table.header, table.rows[0], strict=True))
    names = ("1 base", "2 bases", "4 bases", "8 bases")
    assert [columns[name] for name in names] == ["51.0", "52.0", "54.0", "58.0"]
    assert "3 bases" not in columns
    assert mixture_table(one).rows == [["accuracy", *(f"{50 + n}.0%" for n in range(1, 9))]]


def test_traffic_has_the_largest_kind_first_and_the_sum_last() -> None:
    traffic = {"hello": {"up": 1000, "down": 0}, "update": {"up": 2_000_000, "down": 500_000}}
    assert traffic_table(traffic).rows == [
        ["update", "2.000", "0.500"],
        ["hello", "0.001", "0.000"],
        ["all", "2.001", "0.500"],
    ]


def test_a_table_is_markdown_with_its_names_to_the_left() -> None:
    table = Table("Title", ["name", "why", "value"], [["a|b", "so", "1"]], left=2)
    assert table.markdown(3) == (
        "### Title\n\n| name | why | value |\n| --- | --- | ---: |\n| a\\|b | so | 1 |"
    )


def test_a_table_of_rounds_fits_eighty_columns() -> None:
    """The table has three tiers, as in the demo."""
    paths = {"device_alone": 0.925, "through_hub": 0.975, "ensemble": 0.98}
    tiers = dict.fromkeys(("small", "medium", "large"), paths)
    console = Console(width=80)
    with console.capture() as shown:
        rows = [record(n, accuracy=tiers, metric="accuracy", local_loss=1.0) for n in (1, 40)]
        console.print(rounds_table(rows).rich())
    assert shown.get().count("92.5/98.0") == 6


def test_settings_are_written_as_toml_that_reads_back() -> None:
    settings = {
        "run": 'a "quoted" folder',
        "keep_serving": True,
        "rounds": {"count": 3},
        "mix": {"attack": {"epsilon": 0.1, "steps": 7}, "options": [1, 2], "rate": 3e-05},
    }
    assert tomllib.loads(to_toml(settings)) == settings
