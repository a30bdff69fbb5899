"""FedSplitX and its baselines on CIFAR-10: 50 simulated devices in three levels.

    python -m benchmarks.methods --data CIFAR10 [--work runs/methods] [--json FILE] [--docs FOLDER]

``CIFAR10`` is a folder with CIFAR-10 in its Python or binary format, or an ``.npz`` file. The job
is ``methods.toml`` beside this file. It runs with an IID and a Dirichlet 0.3 partition, with every
method and three seeds. Finished runs in the work folder are not repeated; an interrupted run
resumes. ``--docs docs`` also writes tables and pictures into ``docs/results.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.pages import put_between
from edge_sdk.errors import CutlayerError
from server_hub.methods.registry import simulated_methods
from server_hub.reports.comparison import Summary, accuracy_table, cost_table
from server_hub.reports.files import write_rows
from server_hub.reports.plots import draw_comparison
from server_hub.simulation.cli import run_comparison
from server_hub.simulation.compare import cells_of
from server_hub.simulation.job import Job, methods_of
from server_hub.simulation.partition import Kind
from server_hub.simulation.results import Runs, partition_name, rows_of, summary
from server_hub.storage.run_folder import RoundRecord, read_records

JOB = Path(__file__).with_name("methods.toml")
METHODS = (
    "fedsplitx,fedsplitx-paper,exc,fedavg,depthfl,fjord,accsfl,splitfed-v1,splitfed-v2,ampere,"
    "centralized"
)

PARTITIONS: tuple[Kind, ...] = ("dirichlet", "iid")


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an .npz file.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/methods"),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = METHODS,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    finished: Annotated[
        bool, typer.Option("--finished", help="Run nothing; show the finished runs.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Folder of results.md; tables and pictures go there.")
    ] = None,
) -> None:
    """Run the benchmark, or the rest of an interrupted one."""
    console = Console(highlight=False)
    job = Job.read(JOB)
    job = replace(job, data=replace(job.data, source=str(data.absolute())))
    rows, sections = [], []
    for kind in PARTITIONS:
        here = replace(job, partition=replace(job.partition, kind=kind))
        console.print(f"[bold]{partition_name(here)}[/]")
        if finished:
            runs = finished_runs(here, methods_of(methods), range(seeds), work / kind)
        else:
            runs = run_comparison(
                console, here, methods_of(methods), range(seeds), work / kind, "torch", Path(), jobs
            )
        if not runs:
            console.print("no run is finished")
            continue
        for (method, _), run in runs.items():
            rows += rows_of(method, *run)
        found = summary(runs)
        console.print(accuracy_table(found).rich())
        console.print(cost_table(found).rich())
        sections.append(section(here, runs, found, kind))
        if docs is not None:
            draw_comparison(found, docs / f"methods-{kind}.png", list(simulated_methods()))
    if json_file is not None:
        write_rows(json_file, rows)
    if docs is not None:
        put_between(docs / "results.md", "methods", "\n\n".join([setting(job), *sections]))


def finished_runs(
    job: Job, methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> dict[tuple[str, int], tuple[Job, list[RoundRecord]]]:
    """Return the finished runs in a folder."""
    return {
        (cell.job.method, cell.job.seed): (cell.job, read_records(cell.folder))
        for cell in cells_of(job, methods, seeds, folder)
        if cell.finished("torch")
    }


def seeds_of(runs: Runs) -> str:
    """Return a sentence with the number of seeds, and the methods that have fewer."""
    counts = Counter(method for method, _ in runs)
    most = max(counts.values())
    fewer = [f"{method} {n}" for method, n in counts.items() if n < most]
    return f"Seeds: {most}" + (f"; fewer for {', '.join(fewer)}." if fewer else ".")


def section(job: Job, runs: Runs, found: Summary, kind: str) -> str:
    """Return the tables and the picture of a partition, in Markdown."""
    return "\n\n".join(
        [
            f"### {partition_name(job)}",
            seeds_of(runs),
            accuracy_table(found).markdown(level=4),
            cost_table(found).markdown(level=4),
            f"![accuracy against rounds, traffic and time, and by tier](methods-{kind}.png)",
        ]
    )


def setting(job: Job) -> str:
    """Return the settings that all runs share, in Markdown."""
    tiers = "; ".join(
        f"{t.clients} {name} (cut {t.cut}, {t.gflops:g} GFLOPS, {t.uplink_mbit:g} Mbit/s up)"
        for name, t in job.tiers.items()
    )
    return (
        f"{job.clients} devices: {tiers}. {job.rounds.count} rounds with {job.rounds.per_round} "
        f"devices each, one local epoch in batches of {job.local.batch_size}, the same learning "
        f"rates for all (devices {job.local.hyper['lr']:g}, trunk {job.trunk.hyper['lr']:g}, "
        f"cosine). Accuracy on {job.data.test} held-out images; mean and standard deviation over "
        "the seeds. Times are virtual."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CutlayerError as error:
        raise SystemExit(f"benchmarks.methods: {error}") from error
