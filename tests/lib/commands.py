"""Commands that end with one sentence of error."""

from __future__ import annotations

import pytest

from edge_sdk.cli.main import main
from tests.lib.harness import cutlayer, finish


def expect_one_sentence(arguments: list[str], *expected: str, code: int = 2) -> None:
    """A command as a process ends with an exit code and one line that contains all of these."""
    status, _, err = finish(cutlayer(*arguments), timeout=60)
    assert status == code, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for text in expected:
        assert text in err, err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error that a command in this process ends with, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    err = capsys.readouterr().err
    assert caught.value.code == 2, err
    assert "Traceback" not in err
    (line,) = err.strip().splitlines()
    return line
