"""A comparison of methods and seeds on one job: cells are checked first, then run in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edge_sdk.errors import ConfigError
from export.bundles.model_source import build_model
from export.errors import ExportError
from server_hub.methods.registry import find, simulated_methods
from server_hub.simulation.job import DeviceRuntime, Job
from server_hub.simulation.prepare import (
    check_cuts,
    check_fit,
    fleet_of,
    read_data,
    share_out,
)
from server_hub.simulation.workers import Cell, run_cells
from server_hub.storage.run_folder import RoundRecord, read_records

OnProgress = Callable[[int, int, list[str]], None]
"""Called with the number of finished rounds, of all rounds, and the names of the running cells."""


def compare(
    job: Job,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    runtime: DeviceRuntime = "torch",
    base: Path = Path(),
    jobs: int = 1,
    on_progress: OnProgress = lambda done, total, running: None,
) -> dict[tuple[str, int], list[RoundRecord]]:
    """Run a job with every method and every seed.

    The folder of a run is ``folder/METHOD/seed-N``. A finished run is only read; an interrupted
    run resumes. All errors but :class:`CellFailed` are raised before any run starts.

    Args:
        job: the job to simulate; its own method and seed are ignored.
        methods: names of methods.
        seeds: numbers, 0 or more.
        folder: folder for all runs.
        runtime: runtime of the devices' steps.
        base: folder that relative paths in the job start from.
        jobs: number of runs at a time.
        on_progress: called a few times a second.

    Returns:
        The rounds by method and seed.

    Raises:
        ConfigError: the job does not fit one of the methods or seeds, or a folder holds another
            run.
        DataError: the data cannot be read, or do not fit the model.
        ExportError: the model cannot be cut at a tier's cut layer.
        CellFailed: a run has failed. Finished runs and finished rounds of the others are kept.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} runs at a time; it must be 1 or more")
    cells = cells_of(job, methods, seeds, folder)
    todo = [cell for cell in cells if not cell.finished(runtime)]
    count = job.rounds.count
    done = [0] * len(cells)

    def tell(running: Sequence[Cell]) -> None:
        for number, cell in enumerate(cells):
            if done[number] < count:
                done[number] = cell.rounds_done()
        on_progress(sum(done), count * len(cells), [cell.name for cell in running])

    if todo:
        check([cell.job for cell in todo], runtime, base)
        run_cells(todo, runtime, base.absolute(), min(jobs, len(todo)), tell)
    tell([])
    return {(cell.job.method, cell.job.seed): read_records(cell.folder)[:count] for cell in cells}


def cells_of(job: Job, methods: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Cell]:
    """Return the cells of a comparison, method by method.

    Raises:
        ConfigError: there are no methods or no seeds, a seed is negative, or a method is unknown.
    """
    if not methods or not seeds:
        raise ConfigError("there is nothing to compare; give at least one method and one seed")
    negative = [seed for seed in seeds if seed < 0]
    if negative:
        raise ConfigError(f"seed {negative[0]} is negative; seeds are 0 or more")
    try:
        return [
            Cell(replace(job, method=method, seed=seed), folder / method / f"seed-{seed}")
            for method in dict.fromkeys(methods)
            for seed in dict.fromkeys(seeds)
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check(jobs: Sequence[Job], runtime: DeviceRuntime, base: Path) -> None:
    """Check the jobs of one comparison without running them.

    Raises:
        ConfigError: a partition leaves a client without examples, model and data do not fit, or
            a method does not fit the job.
        DataError: the data cannot be read.
        ExportError: the model cannot be built, or cannot be cut at a tier's cut layer.
    """
    data = read_data(jobs[0], base)
    example = torch.from_numpy(data.train.x[:8])
    for job in {
        job.seed: job for job in jobs if not find(job.method, simulated_methods()).pooled
    }.values():
        share_out(job, job.tiers, data)
    for job in {job.method: job for job in jobs}.values():
        model = build_model(job.model)
        check_cuts(job, model)
        check_fit(model, example, data.classes)
        tiers = {n: t.exported(runtime, job.local.batch_size) for n, t in job.tiers.items()}
        try:
            find(job.method, simulated_methods()).fleet(
                fleet_of(job, model, tiers, example, data.classes)
            )
        except ExportError as error:
            raise ConfigError(f"method {job.method!r} does not fit this job: {error}") from error
