"""A process that runs the bare PyTorch loop."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.bare_loop import BareBatch, BareLoop
from benchmarks.replay import read_batches, read_devices
from benchmarks.trunk_workloads import CODEC, cut_of, get_workload

Composition = list[tuple[str, int]]
"""A merged step: the device and the number of each of its batches."""

RATE = 1e-3
"""Learning rate of the trunk and of the bare loop."""

MAX_NORM = 25.0
"""Maximum norm of the gradients of a step, in the trunk and in the bare loop."""


def run_steps(
    pipe: Connection, folder: Path, name: str, device: str, mode: str, threads: int
) -> None:
    """Run the process of the bare loop.

    It receives the steps of a turn over the pipe, runs them, and answers with their seconds and
    their processor time.
    """
    torch.set_num_threads(threads)
    workload = get_workload(name, device)
    model = workload.model()
    model.load(folder / "bundles" / "model.safetensors")
    loop = BareLoop(model, device, mode, workload.optimizer, RATE, MAX_NORM)
    batches = {
        (d.name, number): BareBatch.of(cut_of(d.tier), CODEC, batch, device)
        for d in read_devices(folder)
        for number, batch in enumerate(read_batches(folder, d.name))
    }
    pipe.send("ready")
    while True:
        steps: list[Composition] | str = pipe.recv()
        if isinstance(steps, str):
            return
        before = time.process_time()
        seconds = loop.seconds([[batches[key] for key in step] for step in steps])
        pipe.send((seconds, time.process_time() - before))
