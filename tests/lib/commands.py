"""Runs commands in this process or as a process, and checks output and error messages."""

from __future__ import annotations

import pytest

from edge_sdk.cli.main import main
from tests.lib.harness import cutlayer, finish


def expect_one_sentence(arguments: list[str], *expected: str, code: int = 2) -> None:
    """Check that a command, as a process, ends with an exit code and one line with all texts."""
    status, _, err = finish(cutlayer(*arguments), timeout=60)
    assert status == code, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for text in expected:
        assert text in err, err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must fail in this process; return its one line of error."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    err = capsys.readouterr().err
    assert caught.value.code == code, err
    assert "Traceback" not in err
    (line,) = err.strip().splitlines()
    return line


def expect_refusal(
    capsys: pytest.CaptureFixture[str], arguments: list[str], *expected: str, code: int = 2
) -> None:
    """Check that a command in this process ends with one line of error with all texts."""
    line = refusal(capsys, *arguments, code=code)
    for text in expected:
        assert text in line


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command in this process, which must succeed; return its output."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return captured.out
