"""Several methods and seeds of one job, side by side in processes of their own."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError, CutlayerError
from export.build import build_model
from export.errors import ExportError
from server_hub.methods.registry import find, simulated_methods
from server_hub.reports.plots import draw_comparison
from server_hub.simulation.job import DeviceRuntime, Job
from server_hub.simulation.prepare import (
    check_cuts,
    check_fit,
    describe,
    fleet_of,
    read_data,
    resume,
    share_out,
)
from server_hub.simulation.results import (
    Runs,
    accuracy_grid,
    cost_grid,
    data_name,
    partition_name,
    rows_of,
    summary,
)
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import METRICS, RoundRecord, read_records

_POLL_S = 0.25
"""Seconds between two looks at how far the runs are."""

OnProgress = Callable[[int, int, list[str]], None]
"""Told rounds done, rounds in all, and what runs now."""


class CellFailed(CutlayerError):
    """A method failed with a seed; the others keep what they have."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Attributes:
        job: the job with this method and seed.
        folder: of its run.
    """

    job: Job
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.job.method}, seed {self.job.seed}"

    def finished(self, runtime: DeviceRuntime) -> bool:
        """Whether its run is at its end; :class:`ConfigError` if the folder holds another."""
        last = resume(self.folder, describe(self.job, runtime))
        return last is not None and last.completed >= self.job.rounds.count

    def rounds_done(self) -> int:
        """Rounds in its metrics, as far as they count."""
        with suppress(FileNotFoundError):
            lines = (self.folder / METRICS).read_bytes().count(b"\n")
            return min(lines, self.job.rounds.count)
        return 0


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

    Each has its run in ``folder/METHOD/seed-N``. One that is finished is only read, one that was
    interrupted goes on.

    Args:
        job: what to simulate; its own method and seed do not count.
        methods: names of methods.
        seeds: numbers, 0 or more.
        folder: for all runs.
        runtime: what runs the devices' steps.
        base: folder that relative paths in the job start from.
        jobs: runs at a time.
        on_progress: called a few times a second.

    Returns:
        The rounds by method and seed.

    Raises:
        ConfigError: the job cannot be with one of the methods or seeds, or a folder holds another
            run; told before anything runs.
        DataError: the data cannot be read, or do not fit the model.
        ExportError: the model cannot be cut so.
        CellFailed: a run has failed; what is finished, and the rounds of the others, stay.
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
        _run(todo, runtime, base.absolute(), min(jobs, len(todo)), tell)
    tell([])
    return {(cell.job.method, cell.job.seed): read_records(cell.folder)[:count] for cell in cells}


def cells_of(job: Job, methods: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Cell]:
    """The cells of a comparison, method by method; :class:`ConfigError` if there is none."""
    if not methods or not seeds:
        raise ConfigError("there is nothing to compare: name one method and one seed or more")
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
    """What can be known of jobs of one comparison without running them.

    Raises:
        ConfigError: a partition leaves a client without examples, model and data do not fit, or
            a method does not fit the job.
        DataError: the data cannot be read.
        ExportError: the model cannot be built, or cut so.
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
            find(job.method, simulated_methods()).arrange(
                fleet_of(job, model, tiers, example, data.classes)
            )
        except ExportError as error:
            raise ConfigError(f"method {job.method!r} does not fit this job: {error}") from error


def write_comparison(folder: Path, runs: Runs, target: float | None = None) -> None:
    """Write ``results.json``, ``report.md`` and ``comparison.png``.

    Args:
        folder: where.
        runs: by method and seed.
        target: accuracy or perplexity to reach; None for the best that every method reaches.

    Raises:
        ConfigError: a run without a measured round, or the folder cannot be written.
    """
    found = summary(runs, target)
    job = next(iter(runs.values()))[0]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for _, seed in runs))
    rows = [json.dumps(row) for (method, _), run in runs.items() for row in rows_of(method, *run)]
    parts = [
        f"# {data_name(job)}, {partition_name(job)}: {job.rounds.count} rounds, {job.clients} "
        f"devices",
        f"Model `{job.model}`; {job.rounds.per_round or job.clients} devices in a round; "
        f"seeds {seeds}.",
        accuracy_grid(found).markdown(),
        cost_grid(found).markdown(),
        f"![{found.metric} against rounds, traffic and time, and by tier](comparison.png)",
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "results.json", ("[\n" + ",\n".join(rows) + "\n]\n").encode())
        draw_comparison(runs, folder / "comparison.png", target)
        write_atomically(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error


# --- processes ------------------------------------------------------------------------------------


class _Worker:
    """A process that runs one cell after the other.

    Args:
        threads: of its torch.
        scratch: folder for temporary files, which outlive a process that is stopped.
    """

    def __init__(self, threads: int, scratch: str) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process: Any = context.Process(
            target=_work, args=(theirs, threads, scratch), daemon=True
        )
        self.cell: Cell | None = None
        # Read when torch is imported. A thread that waits must not take time from other runs.
        with (
            _environment(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE"),
            _ignoring_interrupts(),
        ):
            self._process.start()
        theirs.close()

    def begin(self, cell: Cell, runtime: DeviceRuntime, base: Path) -> None:
        """Let it run a cell; its pipe has an answer when it is done."""
        self.cell = cell
        with suppress(OSError):  # a process that has died is noticed by the missing answer
            self.pipe.send((cell, runtime, base))

    def end(self) -> None:
        """Take the answer; :class:`CellFailed` if there is a failure, or no answer."""
        assert self.cell is not None
        try:
            failure = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            failure = f"its process ended with exit code {self._process.exitcode}"
        if failure is not None:
            raise CellFailed(
                f"method {self.cell.job.method!r} with seed {self.cell.job.seed} failed: {failure}"
            )
        self.cell = None

    def stop(self) -> None:
        """End the process, in the middle of whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _run(
    cells: Sequence[Cell],
    runtime: DeviceRuntime,
    base: Path,
    jobs: int,
    tell: Callable[[Sequence[Cell]], None],
) -> None:
    """Run cells, so many at a time."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(reversed(cells))
    workers: list[_Worker] = []
    scratch = tempfile.TemporaryDirectory(prefix="cutlayer-")
    try:
        for _ in range(jobs):
            workers.append(_Worker(threads, scratch.name))
            workers[-1].begin(waiting.pop(), runtime, base)
        while busy := [worker for worker in workers if worker.cell is not None]:
            tell([worker.cell for worker in busy if worker.cell is not None])
            answers = wait([worker.pipe for worker in busy], _POLL_S)
            for worker in busy:
                if worker.pipe in answers:
                    worker.end()
                    if waiting:
                        worker.begin(waiting.pop(), runtime, base)
    finally:
        for worker in workers:
            worker.stop()
        scratch.cleanup()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C is for the parent, which then stops the processes that are started meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread say what signals do
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, threads: int, scratch: str) -> None:
    """The loop of a worker's process: one cell, one answer, a failure or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(scratch,), daemon=True).start()
    tempfile.tempdir = scratch
    torch.set_num_threads(threads)
    with suppress(EOFError):  # the parent has gone
        while True:
            cell, runtime, base = pipe.recv()
            failure = None
            try:
                with Simulation(cell.job, cell.folder, runtime, base) as simulation:
                    simulation.run()
                    simulation.report()
            except CutlayerError as error:
                failure = str(error)
            pipe.send(failure)


def _die_with_parent(scratch: str) -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)
