"""Several methods and seeds side by side: means, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_sdk.inference.metrics import Metric
from server_hub.reports.table import Table
from server_hub.reports.values import LABELS, shown, three_digits

KINDS = {
    "activations": "activations",
    "gradient": "gradients",
    "update": "updates",
    "blob": "models",
}
"""Kinds of messages that carry tensors, and their names in tables. A ``blob`` is a state or a part
of a bundle."""

OTHER = "other"
"""All kinds of messages that are not in :data:`KINDS`."""


@dataclass(frozen=True)
class Point:
    """A measured round of a method, as means over the seeds.

    Attributes:
        round: its number.
        seconds: virtual seconds since the start.
        megabytes: traffic of all devices up and down since the start.
        accuracy: accuracy or perplexity of the fleet.
        low: the lowest over the seeds.
        high: the highest over the seeds.
    """

    round: int
    seconds: float
    megabytes: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Accuracy or perplexity of a method at the end.

    Attributes:
        method: name of the method.
        tier: name of the tier; ``all`` where a method gives all tiers the same.
        path: way to answer, a key of :data:`~server_hub.reports.values.LABELS`.
        mean: mean over the seeds.
        deviation: sample standard deviation over the seeds; None with one seed.
    """

    method: str
    tier: str
    path: str
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Cost:
    """Traffic, time and compute of a method, as means over the seeds.

    Attributes:
        method: name of the method.
        megabytes: traffic of all devices up and down, by kind: those of :data:`KINDS` and
            :data:`OTHER`.
        up: MB from the devices.
        down: MB to the devices.
        seconds: virtual seconds of the whole job.
        device_gflop: 10^9 operations of a device in a round that it takes part in.
        target_s: virtual seconds until the mean over the seeds reaches the target; None if it
            never does.
    """

    method: str
    megabytes: Mapping[str, float]
    up: float
    down: float
    seconds: float
    device_gflop: float
    target_s: float | None


@dataclass(frozen=True)
class Summary:
    """Means over the seeds.

    Attributes:
        scores: by method, tier and path.
        costs: by method.
        curves: the measured rounds of each method.
        target: accuracy or perplexity that :attr:`Cost.target_s` is about.
        seeds: number of seeds.
        metric: what was measured.
    """

    scores: Sequence[Score]
    costs: Sequence[Cost]
    curves: Mapping[str, Sequence[Point]]
    target: float
    seeds: int
    metric: Metric = "accuracy"


def accuracy_table(found: Summary) -> Table:
    """A row per method and tier, a column per way to answer."""
    paths = [path for path in LABELS if any(s.path == path for s in found.scores)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    factor, unit = (100, " in %") if found.metric == "accuracy" else (1, "")
    for s in found.scores:
        deviation = "" if s.deviation is None else f" ± {factor * s.deviation:.1f}"
        cells.setdefault((s.method, s.tier), {})[s.path] = f"{factor * s.mean:.1f}{deviation}"
    rows, above = [], ""
    for (method, tier), answers in cells.items():
        name = "" if method == above else method
        rows.append([name, tier, *(answers.get(path, "") for path in paths)])
        above = method
    seeds = f": mean ± standard deviation of {found.seeds} seeds" if found.seeds > 1 else ""
    title = f"{found.metric.capitalize()}{unit}{seeds}"
    return Table(title, ["method", "tier", *(LABELS[path] for path in paths)], rows, 2)


def cost_table(found: Summary) -> Table:
    """A row per method: traffic, virtual time and the devices' compute."""
    kinds = [kind for kind in KINDS if any(cost.megabytes[kind] for cost in found.costs)]
    header = [
        "method", *(KINDS[kind] for kind in kinds), OTHER, "up", "down", "GFLOP", "job, s",
        f"{shown(found.target, found.metric)}, s",
    ]  # fmt: skip
    if found.metric == "perplexity":
        header[-1] = f"perplexity {header[-1]}"  # a number alone would not say of what
    rows = [
        [
            cost.method,
            *(three_digits(cost.megabytes[kind]) for kind in (*kinds, OTHER)),
            three_digits(cost.up),
            three_digits(cost.down),
            three_digits(cost.device_gflop),
            three_digits(cost.seconds),
            "-" if cost.target_s is None else three_digits(cost.target_s),
        ]
        for cost in found.costs
    ]
    mean = f"; means of {found.seeds} seeds" if found.seeds > 1 else ""
    article = "an" if found.metric == "accuracy" else "a"
    title = (
        "Traffic of all devices in MB, GFLOP of a device in a round, virtual seconds of the job "
        f"and until {article} {found.metric} of {shown(found.target, found.metric)}{mean}"
    )
    return Table(title, header, rows)
