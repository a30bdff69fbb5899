"""Help texts: Rich reads brackets as markup and leaves them out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    path
    for package in ("edge_sdk", "export", "server_hub", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "typer" in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_help_is_left_out(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "help":
                    text = ast.unparse(keyword.value)
                    assert "[" not in text, f"line {node.lineno}: give show_default instead"
