"""Writes results of benchmarks into pages."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError


def put_between(path: Path, name: str, text: str) -> None:
    """Replace the text between the marks of a benchmark in a page.

    Args:
        path: a Markdown file with ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
        name: name of the benchmark.
        text: the new text, in Markdown.

    Raises:
        ConfigError: the file does not have the marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{path} has no marks {begin} and {end} to write between")
    write_atomically(path.absolute(), f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())
