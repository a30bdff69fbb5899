"""What a device remembers of the releases that it has tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_sdk.bundle.store import BlobStore
from edge_sdk.bundle.trials import Trials
from edge_sdk.errors import BundleError

FIRST, SECOND = "1" * 64, "2" * 64


def test_what_has_passed_is_remembered_by_device(tmp_path: Path) -> None:
    trials = Trials(tmp_path / "cache", "ada's token")
    assert trials.passed is None
    trials.begin(FIRST)
    trials.end(FIRST, passed=True)
    trials.begin(SECOND)
    trials.end(SECOND, passed=False)
    assert Trials(tmp_path / "cache", "ada's token").passed == FIRST
    assert Trials(tmp_path / "cache", "bo's token").passed is None
    assert "token" not in "".join(p.read_text() for p in (tmp_path / "cache").iterdir())


def test_a_release_that_ended_the_process_twice_is_not_begun(tmp_path: Path) -> None:
    """Another release is, and so is one that was tried to its end in between."""
    for _ in range(2):
        Trials(tmp_path, "t").begin(FIRST)
    with pytest.raises(BundleError, match="ended 2 times"):
        Trials(tmp_path, "t").begin(FIRST)
    with pytest.raises(BundleError, match="ended 2 times"):
        Trials(tmp_path, "t").begin(FIRST)
    Trials(tmp_path, "t").begin(SECOND)
    Trials(tmp_path, "t").begin(FIRST)
    trials = Trials(tmp_path, "t")
    trials.begin(FIRST)
    trials.end(FIRST, passed=False)
    for _ in range(2):
        Trials(tmp_path, "t").begin(FIRST)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"passed": null}', json.dumps({"trying": 1})])
def test_a_damaged_file_is_begun_anew(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trials(tmp_path, "t").begin(FIRST)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    trials = Trials(tmp_path, "t")
    assert trials.passed is None
    assert "is begun anew" in caplog.text
    trials.end(FIRST, passed=True)
    assert Trials(tmp_path, "t").passed == FIRST


def test_without_a_folder_that_can_be_written_a_process_remembers_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        trials = Trials(folder, "t")
        trials.begin(FIRST)
        trials.end(FIRST, passed=True)
        assert trials.passed == FIRST
        trials.begin(SECOND)
        assert trials.passed == FIRST
    assert caplog.text.count("cannot be written") == 1


def test_a_piece_of_a_blob(tmp_path: Path) -> None:
    """From any offset up to the end; none beyond it, and none of what is not there."""
    store = BlobStore(tmp_path)
    data = bytes(range(256)) * 4
    name = store.write(data)
    for offset, size in ((0, 10), (1000, 100), (1023, 1), (1024, 5), (0, 5000)):
        assert store.piece(name, offset, size) == (data[offset : offset + size], 1024)
    for offset in (1025, 2**62, 2**64):
        assert store.piece(name, offset, 10) is None
    assert store.piece("0" * 64, 0, 10) is None
