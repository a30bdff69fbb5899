"""The pages that benchmarks write their results into."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError


def put_between(path: Path, name: str, text: str) -> None:
    """Put text into a page, in place of what stands between the marks of a benchmark.

    Args:
        path: a Markdown file with ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
        name: of the benchmark.
        text: Markdown.

    Raises:
        ConfigError: the file has no marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{path} has no marks {begin} and {end} to write between")
    write_atomically(path.absolute(), f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())
