"""``cutlayer simulate`` and ``cutlayer compare``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from server_hub.simulation.job import Job
    from server_hub.storage.run_folder import RoundRecord

JobArgument = Annotated[Path, typer.Argument(help="TOML file, see docs/simulate.md for its keys.")]
RuntimeOption = Annotated[
    str,
    typer.Option(
        help="What runs the devices' steps: torch (fast), or the exported graph on onnx or "
        "executorch."
    ),
]


def simulate(
    job_file: JobArgument,
    run: Annotated[
        Path | None, typer.Option(help="Run folder; an interrupted run there goes on.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Training method, not the job's.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, not the job's.")] = None,
    runtime: RuntimeOption = "torch",
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write TensorBoard logs to this folder.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, one row a line.")
    ] = False,
) -> None:
    """Run a job's hub and devices in one process, on a virtual clock."""
    job = read_job(job_file, runtime, method=method, rounds=rounds, seed=seed)
    folder = run or Path("runs") / f"{job_file.stem}-{job.method}-seed-{job.seed}"
    from server_hub.reports.tables import mixture_rows, move_lines
    from server_hub.reports.tensorboard import Board
    from server_hub.simulation.results import Grid, accuracy_table, cost_table, rows_of
    from server_hub.simulation.simulate import Simulation

    console = Console(stderr=as_json, highlight=False)
    with console.status("") as status:
        simulation = Simulation(job, folder, runtime, job_file.parent, status.update)  # type: ignore[arg-type]
    with simulation, Board(tensorboard) as board:
        console.print(fleet_table(job))
        records = list(simulation.records)
        if records:
            console.print(f"going on after round {len(records)} of {job.rounds.count}")
        bar = Progress(
            TextColumn(simulation.recipe.title), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console,
        )  # fmt: skip
        task = bar.add_task("", total=job.rounds.count, completed=len(records))
        with Live(Group(bar), console=console, transient=not console.is_terminal) as live:

            def on_round(record: RoundRecord) -> None:
                records.append(record)
                for line in move_lines(record):
                    console.print(line, soft_wrap=True, markup=False)
                board.round(record)
                bar.update(task, completed=len(records))
                live.update(Group(bar, rounds_table(records)))

            simulation.run(on_round)
        runs = {(job.method, job.seed): (job, records)}
        simulation.report()
    console.print(accuracy_table(runs))
    console.print(cost_table(runs))
    if records[-1].mixed:
        header, scores = mixture_rows(records[-1])
        mixtures = Grid("The best base networks, mixed", header, [scores], 1)
        console.print(mixtures.rich())
    console.print(f"metrics, report, pictures and model in {folder}")
    if as_json:
        for row in rows_of(job.method, job, records):
            print(json.dumps(row))


def read_job(path: Path, runtime: str, **changes: Any) -> Job:
    """The job in a file, with what options change.

    Raises:
        ConfigError: the file, an option, or what they say together is wrong.
    """
    from server_hub.simulation.job import DeviceRuntime, Job

    if runtime not in get_args(DeviceRuntime):
        known = ", ".join(get_args(DeviceRuntime))
        raise ConfigError(f"--runtime is {runtime!r}, must be one of {known}")
    job = Job.read(path)
    if changes.get("rounds") is not None:
        changes["rounds"] = replace(job.rounds, count=changes["rounds"])
    try:
        return replace(job, **{k: v for k, v in changes.items() if v is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fleet_table(job: Job) -> Table:
    """The tiers and what they can do."""
    table = Table(title=f"{job.clients} devices", box=None, padding=(0, 1))
    header = ("tier", "clients", "cut", "GFLOPS", "Mbit/s up", "down", "latency, ms", "loss, %",
              "there, s", "away, s")  # fmt: skip
    for column in header:
        table.add_column(column, justify="left" if column == "tier" else "right")
    for name, t in job.tiers.items():
        row = (t.clients, t.cut, t.gflops, t.uplink_mbit, t.downlink_mbit, t.latency_ms,
               100 * t.loss, t.online_s, t.offline_s if t.online_s else None)  # fmt: skip
        table.add_row(name, *("" if v is None else f"{v:g}" for v in row))
    return table


def rounds_table(records: Sequence[RoundRecord]) -> Table:
    """The last rounds, with what is measured of each tier in its best way to answer."""
    from server_hub.reports.tables import best, shown

    measured = next((r for r in reversed(records) if r.accuracy), None)
    title = None if measured is None else f"{measured.metric} by tier"
    table = Table(title=title, box=None, padding=(0, 1))
    tiers = list(measured.accuracy) if measured is not None else []
    header = ("round", "time, s", "devices", "gone", "loss", "trunk loss", *tiers, "MB up",
              "MB down")  # fmt: skip
    for column in header:
        table.add_column(column, justify="right")
    for r in records[-6:]:
        losses = ("" if v is None else f"{v:.3f}" for v in (r.local_loss, r.trunk_loss))
        values = [
            shown(best(r.accuracy[t].values(), r.metric), r.metric) if r.accuracy else ""
            for t in tiers
        ]
        table.add_row(
            str(r.round), f"{r.clock:.1f}", str(r.devices), str(len(r.dropped)), *losses, *values,
            f"{r.up / 1e6:.1f}", f"{r.down / 1e6:.1f}",
        )  # fmt: skip
    return table


def compare(
    job_file: JobArgument,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between them; all for all of them.")
    ] = "fedsplitx,exc,fedavg",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0,1,2",
    run: Annotated[
        Path | None, typer.Option(help="Folder; what is finished there is not run again.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Accuracy, as a fraction, or perplexity to reach  [default: what all reach]",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time  [default: processors]")
    ] = None,
    runtime: RuntimeOption = "torch",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, one row a line.")
    ] = False,
) -> None:
    """Run a job with several methods and seeds, and show them side by side."""
    from server_hub.simulation.compare import write_comparison
    from server_hub.simulation.job import methods_of
    from server_hub.simulation.prepare import read_data
    from server_hub.simulation.results import accuracy_table, cost_table, rows_of

    job = read_job(job_file, runtime, rounds=rounds)
    if target is not None and target > 1 and read_data(job, job_file.parent).task == "classes":
        raise ConfigError(f"--target is {target:g}; accuracy is a fraction, from 0 to 1")
    folder = run or Path("runs") / f"compare-{job_file.stem}"
    console = Console(stderr=as_json, highlight=False)
    console.print(fleet_table(job))
    runs = run_comparison(
        console, job, methods_of(methods), _numbers(seeds), folder, runtime, job_file.parent, jobs
    )
    write_comparison(folder, runs, target)
    console.print(accuracy_table(runs))
    console.print(cost_table(runs, target))
    console.print(f"report, results.json and picture in {folder}")
    if as_json:
        for (method, _), (cell, records) in runs.items():
            for row in rows_of(method, cell, records):
                print(json.dumps(row))


def run_comparison(
    console: Console,
    job: Job,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    runtime: str,
    base: Path,
    jobs: int | None,
) -> dict[tuple[str, int], tuple[Job, list[RoundRecord]]]:
    """:func:`server_hub.simulation.compare.compare` with a progress bar."""
    from server_hub.simulation.compare import compare as run_all

    bar = Progress(
        TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console,
    )  # fmt: skip
    with bar:
        task = bar.add_task("checking the jobs", total=None)
        records = run_all(
            job,
            methods,
            seeds,
            folder,
            runtime,  # type: ignore[arg-type]
            base,
            jobs or os.cpu_count() or 1,
            lambda done, total, running: bar.update(
                task, completed=done, total=total, description="; ".join(running)
            ),
        )
    return {
        (method, seed): (replace(job, method=method, seed=seed), rounds)
        for (method, seed), rounds in records.items()
    }


def _numbers(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; give numbers with commas between them") from None
