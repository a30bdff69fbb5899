"""The report of a run: ``report.md`` with its tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from server_hub.reports.files import write_page
from server_hub.reports.plots import draw_curves, draw_cuts
from server_hub.reports.rounds import (
    devices_remark,
    devices_table,
    mixture_table,
    moves_table,
    rounds_table,
    traffic_table,
)
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
        title: heading of the page.
        sections: Markdown between the heading and the tables of the rounds.
        reference: name and value of a line to compare the curves with.
    """
    draw_curves(run.records, run.folder / "curves.png", reference)
    parts = [f"# {title}", *sections]
    if run.records:
        last = run.records[-1]
        parts += [rounds_table(run.records).markdown(), traffic_table(last.bytes).markdown()]
        if last.mixed:
            order = ", ".join(map(str, last.order))
            parts += [mixture_table(last).markdown(), f"Best first: {order}."]
    said = [record for record in run.records if record.on_devices]
    if said:
        parts += [devices_table(said[-1]).markdown(), devices_remark(said[-1])]
    if any(record.moves for record in run.records):
        draw_cuts(run.records, run.folder / "cuts.png")
        parts += [
            moves_table(run.records).markdown(),
            "![cut of each device over the rounds](cuts.png)",
        ]
    parts.append(f"![{run.metric} and traffic over the rounds](curves.png)")
    write_page(run.folder / "report.md", parts)
