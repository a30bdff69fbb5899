"""``cutlayer simulate`` and ``cutlayer compare``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.text import Text

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from server_hub.simulation.job import Job
    from server_hub.storage.run_folder import RoundRecord

JobArgument = Annotated[
    Path, typer.Argument(help="TOML file of the job; docs/simulate.md lists its keys.")
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        help="Runtime of the devices' steps: torch (fast), or onnx or executorch, which run the "
        "exported graphs."
    ),
]


def simulate(
    job_file: JobArgument,
    run: Annotated[
        Path | None, typer.Option(help="Run folder; an interrupted run in it resumes.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Training method, instead of the job's.")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Run folder, checkpoint or weights whose model the job goes on with."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, instead of the job's.")] = None,
    runtime: RuntimeOption = "torch",
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write TensorBoard logs to this folder.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, one row per line.")
    ] = False,
) -> None:
    """Simulate a job: run its hub and devices in one process, on a virtual clock."""
    job = read_job(
        job_file,
        runtime,
        method=method,
        rounds=rounds,
        seed=seed,
        start_from=None if start_from is None else start_from.absolute(),
    )
    folder = run or Path("runs") / f"{job_file.stem}-{job.method}-seed-{job.seed}"
    from server_hub.reports.comparison import accuracy_table, cost_table
    from server_hub.reports.progress import rounds_view
    from server_hub.reports.rounds import mixture_table
    from server_hub.reports.tensorboard import Board
    from server_hub.simulation.results import fleet_table, rows_of, summary
    from server_hub.simulation.simulate import Simulation

    console = Console(stderr=as_json, highlight=False, markup=False)
    with console.status("") as status:
        simulation = Simulation(
            job,
            folder,
            runtime,  # type: ignore[arg-type]
            job_file.parent,
            lambda line: status.update(Text(line)),
        )
    with simulation, Board(tensorboard) as board:
        console.print(fleet_table(job).rich())
        records = list(simulation.records)
        if records:
            console.print(f"resuming after round {len(records)} of {job.rounds.count}")
        with rounds_view(console, simulation.recipe.title, job.rounds.count, records) as show:

            def on_round(record: RoundRecord) -> None:
                records.append(record)
                board.round(record)
                show(record)

            simulation.run(on_round, lambda line: console.print(line, soft_wrap=True))
        simulation.report()
    found = summary({(job.method, job.seed): (job, records)})
    console.print(accuracy_table(found).rich())
    console.print(cost_table(found).rich())
    if records[-1].mixed:
        console.print(mixture_table(records[-1]).rich())
    console.print(f"metrics, report, pictures and model in {folder}", soft_wrap=True)
    if as_json:
        for row in rows_of(job.method, job, records):
            print(json.dumps(row))


def read_job(path: Path, runtime: str, **changes: Any) -> Job:
    """Read the job from a file and apply the options of the command.

    Args:
        path: TOML file of the job.
        runtime: runtime of the devices' steps, as the user has written it.
        changes: values that replace those of the job, by name; None leaves a value as it is.

    Raises:
        ConfigError: the file or an option is invalid, or they do not fit together.
    """
    from server_hub.simulation.job import DeviceRuntime, Job

    if runtime not in get_args(DeviceRuntime):
        known = ", ".join(get_args(DeviceRuntime))
        raise ConfigError(f"--runtime is {runtime!r}; it must be one of {known}")
    job = Job.read(path)
    if changes.get("rounds") is not None:
        changes["rounds"] = replace(job.rounds, count=changes["rounds"])
    try:
        return replace(job, **{k: v for k, v in changes.items() if v is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def compare(
    job_file: JobArgument,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; 'all' for every method.")
    ] = "fedsplitx,exc,fedavg",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    run: Annotated[
        Path | None, typer.Option(help="Folder of the runs; finished runs are not repeated.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Accuracy (a fraction) or perplexity to reach.",
            show_default="the best that every method reaches",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time.", show_default="number of processors"),
    ] = None,
    runtime: RuntimeOption = "torch",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, one row per line.")
    ] = False,
) -> None:
    """Run a job with several methods and seeds, and compare the results."""
    from server_hub.reports.comparison import accuracy_table, cost_table
    from server_hub.simulation.job import methods_of
    from server_hub.simulation.prepare import read_data
    from server_hub.simulation.results import fleet_table, rows_of, summary, write_comparison

    job = read_job(job_file, runtime, rounds=rounds)
    if target is not None and target > 1 and read_data(job, job_file.parent).task == "classes":
        raise ConfigError(f"--target is {target:g}; accuracy is a fraction, from 0 to 1")
    folder = run or Path("runs") / f"compare-{job_file.stem}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder for the runs")
    console = Console(stderr=as_json, highlight=False, markup=False)
    console.print(fleet_table(job).rich())
    runs = run_comparison(
        console, job, methods_of(methods), _numbers(seeds), folder, runtime, job_file.parent, jobs
    )
    write_comparison(folder, runs, target)
    found = summary(runs, target)
    console.print(accuracy_table(found).rich())
    console.print(cost_table(found).rich())
    console.print(f"report, results.json and picture in {folder}", soft_wrap=True)
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
    from server_hub.reports.progress import progress_bar
    from server_hub.simulation.compare import compare as run_all

    with progress_bar(console, "rounds") as bar:
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
        raise ConfigError(f"--seeds is {text!r}; give numbers, separated by commas") from None
