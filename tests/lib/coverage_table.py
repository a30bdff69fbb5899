"""Prints the coverage by package and by room, from the JSON that ``coverage json`` writes.

``python -m tests.lib.coverage_table build/coverage/coverage.json`` prints the table.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def rooms_of(path: str) -> list[str]:
    """The package of a file, and its room, or the name of the file if it is in no room."""
    package, *inside = PurePath(path).parts
    return [package, f"{package}/{inside[0]}"]


def share(covered: int, total: int) -> float:
    """Percentage of ``total`` that is covered; 100 if ``total`` is 0."""
    return 100 * covered / total if total else 100.0


def table(report: Mapping[str, Any]) -> str:
    """Rows of packages and rooms: per cent of the lines, of the branches, and of both together."""
    sums: dict[str, Counter[str]] = {}
    for path, entry in report["files"].items():
        for room in rooms_of(path):
            counts = sums.setdefault(room, Counter())
            counts.update({name: entry["summary"][name] for name in COUNTS})
    rows = [f"{'':32} {'lines':>7} {'branches':>9} {'both':>7}"]
    for room in sorted(sums):
        lines, statements, taken, branches = (sums[room][name] for name in COUNTS)
        rows.append(
            f"{room:32} {share(lines, statements):6.1f}% {share(taken, branches):8.1f}% "
            f"{share(lines + taken, statements + branches):6.1f}%"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
