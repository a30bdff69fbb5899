"""Runs of a benchmark, several at a time."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server_hub.simulation.workers import Cell


def run_cells(
    console: Console, cells: Sequence[Cell], runs: Sequence[Callable[[], None]], jobs: int
) -> None:
    """Run so many at a time, in processes of one thread, and show how many rounds are done.

    Args:
        console: where.
        cells: those whose rounds are shown.
        runs: what is left of them, each in a process: functions that can be pickled.
        jobs: how many at a time.
    """
    bar = Progress(
        TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    context = mp.get_context("spawn")
    with bar, ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
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
