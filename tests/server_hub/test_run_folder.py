"""The files of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server_hub.storage import run_folder
from server_hub.storage.run_folder import RunFolder


def saved(path: Path) -> float:
    """Return the value that the model in a file holds."""
    return float(load_file(path)["head.bias"][0])


@pytest.mark.parametrize("tier", [None, "base-1"])
def test_the_model_before_the_last_one_is_kept(tmp_path: Path, tier: str | None) -> None:
    run = RunFolder(tmp_path / "run")
    for value in (1.0, 2.0, 3.0):
        path = run.save_model({"head.bias": np.array([value], np.float32)}, tier)
        before = tmp_path / "run" / "previous" / path.name
        assert saved(path) == value
        assert before.exists() == (value > 1)
        assert value == 1 or saved(before) == value - 1
    files = sorted(p.relative_to(tmp_path / "run") for p in tmp_path.rglob("*") if p.is_file())
    assert files == [Path(path.name), Path("previous") / path.name]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_is_full_leaves_both_models_whole(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    for value in (1.0, 2.0):
        path = run.save_model({"head.bias": np.array([value], np.float32)}, None)
    write, calls = run_folder.write_atomically, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError("No space left on device")
        write(path, data)

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        run.save_model({"head.bias": np.array([3.0], np.float32)}, None)
    assert saved(path) == 2.0
    assert saved(path.parent / "previous" / path.name) == failing
