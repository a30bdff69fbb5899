"""The changes that ``tests.lib.mutate`` makes, and the tests that it has for every room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.lib.mutants import Mutant, mutants
from tests.lib.mutate import ROOMS, pick

ROOT = Path(__file__).parent.parent

SAMPLE = '''"""A text."""
import logging

log = logging.getLogger("x")


def function(a: int = 3, *, flag: bool = True) -> "list[int] | None":
    """Another text, with 1 < 2."""
    assert a < 7, "no"
    log.warning("%d", a + 1)
    if a < 5 and flag:
        return [a]
    if not flag:
        raise ValueError(f"wrong: {a + 1}")
    function(a - 1, flag)
    return None
'''


def changes(source: str) -> set[tuple[int, str, str]]:
    """Return line, before and after of every mutant."""
    return {(m.line, m.before, m.after) for m in mutants(source)}


def test_changes_of_a_sample() -> None:
    """Mutants have every kind of change; texts, annotations, assertions and logging stay."""
    assert changes(SAMPLE) == {
        (7, "3", "4"),
        (7, "True", "False"),
        (11, "a < 5 and flag", "a < 5 or flag"),
        (11, "a < 5 and flag", "not (a < 5 and flag)"),
        (11, "a < 5", "a <= 5"),
        (11, "5", "6"),
        (12, "return [a]", "return None"),
        (13, "not flag", "flag"),
        (13, "not flag", "not not flag"),
        (14, 'raise ValueError(f"wrong: {a + 1}")', "pass"),
        (15, "function(a - 1, flag)", "pass"),
        (15, "function(a - 1, flag)", "function(flag, a - 1)"),
        (15, "a - 1", "a + 1"),
        (15, "1", "2"),
    }


@pytest.mark.slow
def test_every_mutant_is_a_program_that_differs_in_one_place() -> None:
    """This holds for all files of the repository, also those with text beyond ASCII."""
    for path in sorted((ROOT / "edge_sdk").rglob("*.py")):
        source = path.read_text("utf-8")
        original = ast.dump(ast.parse(source))
        for mutant in mutants(source):
            assert ast.dump(ast.parse(mutant.source)) != original, f"{path}:{mutant}"


@pytest.mark.parametrize("seed", [0, 1])
def test_lines_are_drawn_by_the_seed(seed: int) -> None:
    """The same seed draws the same lines, and no line twice."""
    drawn = pick(ROOT, "edge_sdk/protocol", 20, seed)
    assert drawn == pick(ROOT, "edge_sdk/protocol", 20, seed)
    assert drawn != pick(ROOT, "edge_sdk/protocol", 20, seed + 1)
    places: set[tuple[Path, int]] = {(path, mutant.line) for path, mutant in drawn}
    assert len(places) == 20
    assert all(isinstance(mutant, Mutant) for _, mutant in drawn)


def test_every_room_has_tests() -> None:
    """Every folder of the device's and the hub's code is a room, and its tests exist."""
    folders = {
        f"{package}/{path.parent.name}"
        for package in ("edge_sdk", "server_hub")
        for path in (ROOT / package).glob("*/__init__.py")
    }
    assert set(ROOMS) == folders
    for tests in ROOMS.values():
        for path in (*tests.own, *tests.wider):
            assert (ROOT / "tests" / path).is_file(), path
