"""The live view of a run: a progress bar, and a table that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from server_hub.reports.rounds import move_lines, rounds_table
from server_hub.storage.run_folder import RoundRecord

_ROWS = 6
"""Rounds in the live table."""


def progress_bar(console: Console, title: str) -> Progress:
    """A bar with a count, the time so far and the time left; then the task's description."""
    return Progress(
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console,
    )  # fmt: skip


@contextmanager
def live_view(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Something that changes while a run goes on; yields a function that shows its new state."""
    with Live(console=console) as live:
        yield live.update
    if not console.is_terminal:
        console.line()  # a file gets the last state once, without the end of its line


@contextmanager
def rounds_view(
    console: Console, title: str, count: int, done: Sequence[RoundRecord] = ()
) -> Iterator[Callable[[RoundRecord], None]]:
    """A bar over the rounds above a table of the last ones; moves of cuts scroll by above both.

    Args:
        console: where to show them.
        title: in front of the bar.
        count: rounds of the whole run.
        done: rounds of an earlier part of the run.

    Yields:
        A function that adds a round.
    """
    records = list(done)
    bar = progress_bar(console, title)
    task = bar.add_task("", total=count, completed=len(records))
    with live_view(console) as show:

        def add(record: RoundRecord) -> None:
            for line in move_lines(record):
                console.print(f"after round {record.round} {line}", soft_wrap=True, markup=False)
            records.append(record)
            bar.update(task, completed=len(records))
            show(Group(bar, rounds_table(records, _ROWS).rich()))

        show(bar)
        yield add
