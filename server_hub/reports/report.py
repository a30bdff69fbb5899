"""The report of a run: ``report.md`` with its tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from edge_sdk.bundle.store import write_atomically
from server_hub.reports.plots import draw_curves, draw_cuts
from server_hub.reports.tables import mixture_table, moves_table, rounds_table, traffic_table
from server_hub.storage.run_folder import RunFolder


def write_report(
    run: RunFolder,
    title: str,
    sections: Sequence[str] = (),
    reference: tuple[str, float] | None = None,
) -> None:
    """Write ``report.md`` and ``curves.png``; where cuts have moved, ``cuts.png`` too.

    Args:
        run: the run's folder.
        title: of the report.
        sections: what comes before the tables.
        reference: name and value of a line to compare the curves with.
    """
    draw_curves(run.records, run.folder / "curves.png", reference)
    parts = [f"# {title}", *sections]
    if run.records:
        parts += [rounds_table(run.records), traffic_table(run.records[-1].bytes)]
    if run.records and run.records[-1].mixed:
        parts.append(mixture_table(run.records[-1]))
    if any(record.moves for record in run.records):
        draw_cuts(run.records, run.folder / "cuts.png")
        parts += [moves_table(run.records), "![cut of each device over the rounds](cuts.png)"]
    parts.append(f"![{run.metric} and traffic over the rounds](curves.png)")
    write_atomically(run.folder / "report.md", "\n\n".join([*parts, ""]).encode())
