"""The search for the batch that ends the trunk's process, and reports of steps put together."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence

from edge_sdk.protocol.tensors import Array
from server_hub.trunk.errors import WorkerDied
from server_hub.trunk.interface import StepInput, StepReport


async def without_culprits(
    step: Callable[[Sequence[StepInput]], Awaitable[StepReport]],
    inputs: Sequence[StepInput],
    death: WorkerDied,
) -> tuple[StepReport, dict[str, str]]:
    """Train on the batches of a step that has ended the process, without the ones to blame.

    The step is halved until every half can be trained or is a single batch. Each half is tried
    once. What the process has trained is lost when a half ends it: these batches are trained again
    at the end. A device with one batch that is to blame is out with all its batches.

    Args:
        step: makes a step; a new process runs by the time that it raises :class:`WorkerDied`.
        inputs: the batches.
        death: how the process has ended.

    Returns:
        The report of the whole step; and by device that is to blame, the reason.
    """
    culprits: dict[str, str] = {}
    # the batches of a device stand together, so that it is found with few attempts
    devices = {device: n for n, device in enumerate(dict.fromkeys(i.device for i in inputs))}
    places = sorted(range(len(inputs)), key=lambda i: devices[inputs[i].device])
    trained: list[tuple[Sequence[int], StepReport]] = []
    waiting: list[list[int]] = []

    def divide(places: list[int], death: WorkerDied) -> None:
        waiting.extend(list(done) for done, _ in trained)
        trained.clear()
        if len(places) == 1:
            culprits[inputs[places[0]].device] = str(death)
            return
        middle = len(places) // 2
        waiting[:0] = [places[:middle], places[middle:]]

    divide(places, death)
    while waiting:
        some = [i for i in waiting.pop(0) if inputs[i].device not in culprits]
        if some:
            try:
                trained.append((some, await step([inputs[i] for i in some])))
            except WorkerDied as again:
                divide(some, again)
    return joined(len(inputs), trained, culprits), culprits


def joined(
    count: int,
    parts: Sequence[tuple[Sequence[int], StepReport]],
    refused: Mapping[str, str],
) -> StepReport:
    """One report of a step that was made in parts.

    Args:
        count: number of batches of the step.
        parts: for each part, the places of its batches in the step, and its report.
        refused: by device whose batches are in no part, the reason.
    """
    reports = [report for _, report in parts]
    rows = sum(report.rows for report in reports)
    loss = sum(report.loss * report.rows for report in reports if report.rows)
    gradients: list[Mapping[str, Array] | None] = [None] * count
    losses: list[tuple[float, int] | None] = [None] * count
    reasons: dict[str, str] = {}
    diverged: list[str] = []
    for places, report in parts:
        reasons |= report.refused
        diverged += report.diverged
        for i, place in enumerate(places):
            if report.gradients:
                gradients[place] = report.gradients[i]
            if report.losses:
                losses[place] = report.losses[i]
    return StepReport(
        loss / rows if rows else math.nan,
        rows,
        reasons | dict(refused),
        gradients if any(report.gradients for report in reports) else (),
        losses,
        diverged,
    )
