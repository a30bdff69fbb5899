"""TensorBoard logs contain the figures of the rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError
from server_hub.reports.tensorboard import Board
from server_hub.storage.run_folder import RoundRecord


def record(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        clock=10.0 * number,
        seconds=10.0,
        devices=3,
        dropped={"phone": "left"},
        local_loss=None if number == 2 else 2.0 / number,
        local_accuracy=0.5,
        trunk_loss=1.5,
        trunk_steps=7,
        accuracy={"small": {"device_alone": 0.1 * number}} if number != 2 else {},
        bytes={"update": {"up": 2_000_000, "down": 0}, "blob": {"up": 0, "down": 500_000}},
    )


def test_every_round_is_logged_and_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with Board(tmp_path / "logs") as board:
        for number in (1, 2, 3):
            board.round(record(number))
    logs = event_accumulator.EventAccumulator(str(tmp_path / "logs"))
    logs.Reload()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(e.step, pytest.approx(e.value)) for e in logs.Scalars(name)]

    assert curve("accuracy/small/device_alone") == [(1, 0.1), (3, 0.3)]
    assert curve("loss/devices") == [(1, 2.0), (3, 2.0 / 3)]
    assert curve("traffic/MB up") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert curve("time/seconds since the start") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert curve("round/dropped") == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with Board(None) as board:
        board.round(record(1))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        Board(tmp_path / "file")
