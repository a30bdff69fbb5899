"""The protocol's specification, ``docs/protocol.md``, as tests read it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


SPECIFICATION = (ROOT / "docs" / "protocol.md").read_text("utf-8")


def section(title: str) -> str:
    """The text under a heading of the specification."""
    level = re.search(rf"^(#+) {re.escape(title)}$", SPECIFICATION, re.MULTILINE)
    assert level is not None, f"docs/protocol.md has no section {title!r}"
    return re.split(r"^#+ ", SPECIFICATION[level.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text, by cell; heads and rules are left out."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip(" |") for cell in line] for line in lines if line[0].strip()[0] in "`["]
