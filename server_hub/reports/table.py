"""A table, shown in the terminal or written as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich import box


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. The first ``left`` columns hold names, the others numbers.

    Attributes:
        title: the heading; empty for none.
        header: a name for each column.
        rows: cells, as many in each row as the header has.
        left: number of columns that are aligned to the left.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def rich(self) -> rich.table.Table:
        """For the terminal."""
        table = rich.table.Table(
            title=self.title or None,
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        for number, column in enumerate(self.header):
            if number < self.left:
                table.add_column(column, no_wrap=True)
            else:
                cells = max((len(row[number]) for row in self.rows), default=0)
                width = max([cells, *(len(word) for word in column.split())])
                header = "\n".join(textwrap.wrap(column, width))  # no wider than it must be
                table.add_column(header, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self, level: int = 2) -> str:
        """For a page: a heading of this level, then the table."""
        rule = ["---" if n < self.left else "---:" for n in range(len(self.header))]
        rows = ([cell.replace("|", "\\|") for cell in row] for row in self.rows)
        lines = ["| " + " | ".join(row) + " |" for row in (self.header, rule, *rows)]
        heading = [f"{'#' * level} {self.title}", ""] if self.title else []
        return "\n".join([*heading, *lines])
