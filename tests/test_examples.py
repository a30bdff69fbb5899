"""The scripts in ``examples`` run."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_digits_example_writes_examples_of_two_devices_and_a_held_out_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "digits" / "make_data.py"), run_name="__main__")
    files = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert files == ["device-0.npz", "device-1.npz", "held_out.npz"]
    for name in files:
        with np.load(tmp_path / "work" / name) as data:
            assert data["x"].shape == (len(data["y"]), 1, 8, 8)
            assert len(data["y"]) > 100
