"""Runs the cells of a benchmark, several at a time."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

import torch
from rich.console import Console

from server_hub.reports.progress import progress_bar
from server_hub.simulation.workers import Cell


def run_cells(
    console: Console, cells: Sequence[Cell], runs: Sequence[Callable[[], None]], jobs: int
) -> None:
    """Run cells in processes of one thread each, and show the number of finished rounds.

    Args:
        console: console that shows the progress.
        cells: cells whose rounds are counted.
        runs: functions that each run the rest of one cell, in a process; they must be picklable.
        jobs: number of processes at a time.
    """
    context = mp.get_context("spawn")
    with (
        progress_bar(console, "rounds") as bar,
        ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool,
    ):
        task = bar.add_task("", total=sum(cell.job.rounds.count for cell in cells))
        waiting = {pool.submit(run) for run in runs}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                bar.update(task, completed=sum(cell.rounds_done() for cell in cells))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
