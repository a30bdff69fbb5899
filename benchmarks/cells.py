"""Runs of a benchmark, several at a time."""

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
    """Run cells in processes of one thread each, and show how many rounds are done.

    Args:
        console: where to show it.
        cells: the cells whose rounds are counted.
        runs: functions that run what is left of them, each in a process; they must pickle.
        jobs: processes at a time.
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
