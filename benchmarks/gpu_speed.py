"""Speed of the trunk's step on a torch device, its loss in bfloat16, and its host waits."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bare_loop import BareLoop
from benchmarks.gpu_exact import state_of
from benchmarks.gpu_models import MergedStep, Shape, merged_step
from export.cutting.split_model import SplitModel
from export.steps.optimizers import check_hyper
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.step import TrunkTrainer

RATE = 1e-3
MAX_NORM = 25.0
LOSS_RATES = {"sgd": 0.02, "adamw": 3e-4}
"""Learning rates at which the loss falls, by optimizer."""

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "Memcpy DtoH",
)
"""Events of the profiler in which the host waits for the device, or that cause such a wait."""


def synchronize(device: str) -> None:
    """Wait until a torch device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def trainer_of(
    model: SplitModel, device: str, mode: str, optimizer: str, rate: float = RATE
) -> TrunkTrainer:
    """Return a trunk in a round, ready for steps."""
    trainer = TrunkTrainer(model, device)
    hyper = check_hyper(optimizer, {"lr": rate})
    plan = TrunkPlan(optimizer, hyper, max_norm=MAX_NORM, precision=mode)  # type: ignore[arg-type]
    trainer.begin(state_of(model), plan)
    return trainer


@dataclass(frozen=True)
class Speed:
    """Speed of the trunk's step and of the bare loop.

    Attributes:
        samples_per_s: samples per second of the trunk; the median of its turns.
        bare_samples_per_s: samples per second of the bare loop; the median of its turns.
        ratios: ratio of the two in each pair of turns.
    """

    samples_per_s: float
    bare_samples_per_s: float
    ratios: list[float]


def speed(
    shape: Shape, device: str, mode: str, optimizer: str, devices: int, rows: int, steps: int,
    turns: int,
) -> Speed:  # fmt: skip
    """Time the trunk's steps and the bare loop's in turns, on the same batches.

    Args:
        shape: the model.
        device: torch device.
        mode: ``fp32`` or ``bf16``.
        optimizer: ``sgd`` or ``adamw``.
        devices: number of devices whose batches are merged.
        rows: rows of each batch.
        steps: number of steps in a turn.
        turns: number of turns of each side.
    """
    model = shape.model().to(device)
    step = merged_step(shape, model, devices, rows, 0, device)
    loop = BareLoop(shape.model(), device, mode, optimizer, RATE, MAX_NORM)
    trainer = trainer_of(model, device, mode, optimizer)
    _trunk_seconds(trainer, step, min(steps, 3), device)
    loop.seconds([step.bare] * min(steps, 3))
    pairs = [
        (_trunk_seconds(trainer, step, steps, device), loop.seconds([step.bare] * steps))
        for _ in range(turns)
    ]
    samples = steps * devices * rows * shape.samples_per_row
    return Speed(
        statistics.median(samples / trunk for trunk, _ in pairs),
        statistics.median(samples / bare for _, bare in pairs),
        [bare / trunk for trunk, bare in pairs],
    )


def _trunk_seconds(trainer: TrunkTrainer, step: MergedStep, steps: int, device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        trainer.step(step.inputs)
    synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Losses:
    """Mean loss of the first step, and of the last tenth of the steps, by mode."""

    first: dict[str, float]
    last: dict[str, float]


def losses(
    shape: Shape, device: str, optimizer: str, steps: int, devices: int, rows: int
) -> Losses:
    """Train in both precisions on the same batches, in the same order.

    Four merged steps of fixed batches are repeated, so that the loss falls.
    """
    model = shape.model().to(device)
    data = [merged_step(shape, model, devices, rows, seed, device) for seed in range(4)]
    first, last = {}, {}
    for mode in ("fp32", "bf16"):
        trainer = trainer_of(shape.model(), device, mode, optimizer, LOSS_RATES[optimizer])
        found = [trainer.step(data[i % len(data)].inputs).loss for i in range(steps)]
        tail = found[-max(steps // 10, 1) :]
        first[mode], last[mode] = found[0], sum(tail) / len(tail)
    return Losses(first, last)


def waits(
    shape: Shape, device: str, optimizer: str, devices: int, rows: int, steps: int
) -> dict[str, float]:
    """Count the events of :data:`WAITS` per step of the trunk, in a profile of ``steps`` steps."""
    model = shape.model().to(device)
    step = merged_step(shape, model, devices, rows, 0, device)
    trainer = trainer_of(model, device, "fp32", optimizer)
    for _ in range(2):
        trainer.step(step.inputs)
    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            trainer.step(step.inputs)
    counts: Counter[str] = Counter()
    for event in profiler.events():
        counts.update(name for name in WAITS if event.name.startswith(name))
    return {name: counts[name] / steps for name in WAITS}
