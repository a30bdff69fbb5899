"""Worker processes that run the cells of a comparison in parallel."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from edge_sdk.errors import CutlayerError
from server_hub.simulation.job import DeviceRuntime, Job
from server_hub.simulation.prepare import (
    describe,
    resume,
)
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import METRICS

_POLL_S = 0.25
"""Seconds between two reports of progress."""


class CellFailed(CutlayerError):
    """The run of a method with a seed failed; finished rounds of all runs are kept."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Attributes:
        job: the job with this method and seed.
        folder: folder of its run.
    """

    job: Job
    folder: Path

    @property
    def name(self) -> str:
        """Method and seed, for messages."""
        return f"{self.job.method}, seed {self.job.seed}"

    def finished(self, runtime: DeviceRuntime) -> bool:
        """Return whether the run of the cell is finished.

        Raises:
            ConfigError: the folder has a run of another job.
        """
        last = resume(self.folder, describe(self.job, runtime))
        return last is not None and last.completed >= self.job.rounds.count

    def rounds_done(self) -> int:
        """Return the number of rounds in the metrics of the run, at most that of the job."""
        with suppress(FileNotFoundError):
            lines = (self.folder / METRICS).read_bytes().count(b"\n")
            return min(lines, self.job.rounds.count)
        return 0


class _Worker:
    """A process that runs one cell after the other.

    Args:
        threads: number of threads of torch in the process.
        scratch: folder for temporary files; they remain when the process is killed.
    """

    def __init__(self, threads: int, scratch: str) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process: Any = context.Process(
            target=_work, args=(theirs, threads, scratch), daemon=True
        )
        self.cell: Cell | None = None
        # OpenMP reads these variables when torch is imported. With the policy PASSIVE, a waiting
        # thread takes no processor time from other runs.
        with (
            _environment(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE"),
            _ignoring_interrupts(),
        ):
            self._process.start()
        theirs.close()

    def begin(self, cell: Cell, runtime: DeviceRuntime, base: Path) -> None:
        """Start a cell in the process; the pipe has an answer when the cell ends."""
        self.cell = cell
        with suppress(OSError):  # end() finds out that the process died, as there is no answer
            self.pipe.send((cell, runtime, base))

    def end(self) -> None:
        """Receive the answer of the process.

        Raises:
            CellFailed: the cell failed, or the process died without an answer.
        """
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
        """Kill the process, even in the middle of a cell."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def run_cells(
    cells: Sequence[Cell],
    runtime: DeviceRuntime,
    base: Path,
    jobs: int,
    tell: Callable[[Sequence[Cell]], None],
) -> None:
    """Run cells in parallel.

    Args:
        cells: the cells, at least ``jobs`` of them.
        runtime: runtime of the devices' steps.
        base: folder that relative paths in the jobs start from.
        jobs: number of cells at a time.
        tell: called a few times a second with the cells that run.

    Raises:
        CellFailed: a cell failed; the others are stopped.
    """
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
    """Set environment variables for processes that are started in this context."""
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
    """Ignore Ctrl-C in processes that are started in this context; their parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets signal handlers in the main thread only
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection, threads: int, scratch: str) -> None:
    """Run the loop of a worker process: for each cell, send its failure, or None if it succeeds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(scratch,), daemon=True).start()
    tempfile.tempdir = scratch
    torch.set_num_threads(threads)
    with suppress(EOFError):  # the parent has ended
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
