"""What simulated runs have come to: rows for files, and tables over methods and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from edge_sdk.errors import ConfigError
from edge_sdk.inference.metrics import Metric
from server_hub.reports.tables import LABELS, best, markdown_table, shown
from server_hub.simulation.job import Job
from server_hub.storage.run_folder import RoundRecord

ROW_KEYS = (
    "method", "seed", "data", "partition", "tier", "path", "accuracy", "up_bytes", "down_bytes",
    "sim_seconds", "rounds",
)  # fmt: skip
"""Keys of a row, see :func:`rows_of`; for a model of tokens ``perplexity`` is that of accuracy."""

KINDS = {
    "activations": "activations",
    "gradient": "gradients",
    "update": "updates",
    "blob": "models",
}
"""Kinds of messages that carry tensors, and how tables call them; a ``blob`` is a state or a part
of a bundle."""
OTHER = "other"

Runs = Mapping[tuple[str, int], tuple[Job, Sequence[RoundRecord]]]
"""By method and seed: the job and its rounds."""


# --- one run --------------------------------------------------------------------------------------


def rows_of(method: str, job: Job, records: Sequence[RoundRecord]) -> list[dict[str, object]]:
    """A row per tier and path, with the accuracy or perplexity that was measured last.

    ``up_bytes`` and ``down_bytes`` are those of all devices, ``sim_seconds`` are virtual; both are
    from the start to the end of the run.

    Raises:
        ConfigError: no round was measured.
    """
    end = records[-1]
    return [
        {
            "method": method,
            "seed": job.seed,
            "data": data_name(job),
            "partition": partition_name(job),
            "tier": tier,
            "path": path,
            end.metric: value,
            "up_bytes": end.up,
            "down_bytes": end.down,
            "sim_seconds": end.clock,
            "rounds": len(records),
        }
        for tier, paths in _last_measured(method, job, records).items()
        for path, value in paths.items()
    ]


def data_name(job: Job) -> str:
    """The source of the data, without folder and suffix."""
    return Path(job.data.source).stem or job.data.source


def partition_name(job: Job) -> str:
    """The partition with the number that makes it, like ``dirichlet 0.3`` or ``shards 2``."""
    table = job.partition
    if table.kind in ("dirichlet", "length"):
        return f"{table.kind} {table.alpha:g}"
    return f"shards {table.classes_per_client}" if table.kind == "shards" else table.kind


def fleet_accuracy(
    job: Job, accuracy: Mapping[str, Mapping[str, float]], metric: Metric = "accuracy"
) -> float:
    """Mean over the clients, each answering in its tier's best way.

    Args:
        job: says how many clients a tier has; one that it does not know, the server that holds
            all data, counts as one.
        accuracy: by tier and path.
        metric: whether it is accuracy or perplexity.
    """
    clients = {tier: job.tiers[tier].clients if tier in job.tiers else 1 for tier in accuracy}
    total = sum(count * best(accuracy[tier].values(), metric) for tier, count in clients.items())
    return total / sum(clients.values())


def _last_measured(
    method: str, job: Job, records: Sequence[RoundRecord]
) -> dict[str, dict[str, float]]:
    found = next((r.accuracy for r in reversed(records) if r.accuracy), None)
    if found is None:
        raise ConfigError(
            f"method {method!r} with seed {job.seed}: no round was measured; run it to its end"
        )
    return found


# --- several methods and seeds --------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A measured round of a method, as means over the seeds.

    Attributes:
        round: its number.
        seconds: virtual, since the start.
        megabytes: traffic of all devices up and down, since the start.
        accuracy: of the fleet; or its perplexity.
        low: of the seed with the lowest.
        high: of the seed with the highest.
    """

    round: int
    seconds: float
    megabytes: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Accuracy, or perplexity, of a method at the end.

    Attributes:
        method: its name.
        tier: name of the tier; ``all`` where a method gives all tiers the same.
        path: how the answer was got.
        mean: over the seeds.
        deviation: standard deviation of a sample, over the seeds; None with one seed.
    """

    method: str
    tier: str
    path: str
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Cost:
    """What a method has taken, as means over the seeds.

    Attributes:
        method: its name.
        megabytes: traffic up and down by kind, of all devices: the kinds of :data:`KINDS` and
            ``other``.
        up: MB from the devices.
        down: MB to the devices.
        seconds: virtual, of the whole job.
        device_gflop: 10^9 operations of a device in a round that it takes part in.
        target_s: virtual seconds until the mean over the seeds has reached the target; None if it
            never has.
    """

    method: str
    megabytes: dict[str, float]
    up: float
    down: float
    seconds: float
    device_gflop: float
    target_s: float | None


@dataclass(frozen=True)
class Summary:
    """Means over seeds.

    Attributes:
        scores: by method, tier and path.
        costs: by method.
        target: accuracy or perplexity that ``target_s`` is about.
        seeds: how many there are.
        metric: what was measured.
    """

    scores: list[Score]
    costs: list[Cost]
    target: float
    seeds: int
    metric: Metric = "accuracy"


def summary(runs: Runs, target: float | None = None) -> Summary:
    """Means over the seeds.

    Args:
        runs: at least one.
        target: accuracy or perplexity; None for the best that every method reaches.

    Raises:
        ConfigError: a run without a measured round.
    """
    methods = list(dict.fromkeys(method for method, _ in runs))
    if target is None:
        target = common_target(runs)
    return Summary(
        [score for method in methods for score in _scores(method, runs)],
        [_cost(method, runs, target) for method in methods],
        target,
        len({seed for _, seed in runs}),
        metric_of(runs),
    )


def metric_of(runs: Runs) -> Metric:
    """What was measured in the runs, which are of one model."""
    _, records = next(iter(runs.values()))
    return records[-1].metric


def common_target(runs: Runs) -> float:
    """The best accuracy, or perplexity, that every method's mean over the seeds reaches."""
    metric = metric_of(runs)
    ends = [best((p.accuracy for p in curve), metric) for curve in curves(runs).values()]
    return min(ends) if metric == "accuracy" else max(ends)


def curves(runs: Runs) -> dict[str, list[Point]]:
    """By method: the rounds that were measured with every seed."""
    found = {}
    for method in dict.fromkeys(method for method, _ in runs):
        cells = [
            (job, {r.round: r for r in records if r.accuracy})
            for job, records in _cells(method, runs)
        ]
        rounds = sorted(set.intersection(*(set(measured) for _, measured in cells)))
        found[method] = [
            _point([(job, measured[number]) for job, measured in cells]) for number in rounds
        ]
    return found


def _point(measured: Sequence[tuple[Job, RoundRecord]]) -> Point:
    accuracy = [fleet_accuracy(job, record.accuracy, record.metric) for job, record in measured]
    return Point(
        measured[0][1].round,
        statistics.fmean(r.clock for _, r in measured),
        statistics.fmean((r.up + r.down) / 1e6 for _, r in measured),
        statistics.fmean(accuracy),
        min(accuracy),
        max(accuracy),
    )


def _cells(method: str, runs: Runs) -> list[tuple[Job, Sequence[RoundRecord]]]:
    cells = [run for (name, _), run in runs.items() if name == method]
    for job, records in cells:
        _last_measured(method, job, records)
    return cells


def _scores(method: str, runs: Runs) -> list[Score]:
    ends = [_last_measured(method, job, records) for job, records in _cells(method, runs)]
    tiers = list(ends[0])
    alike = len(tiers) > 1 and all(end[tier] == end[tiers[0]] for end in ends for tier in tiers)
    return [
        Score(
            method,
            "all" if alike else tier,
            path,
            statistics.fmean(end[tier][path] for end in ends),
            statistics.stdev(end[tier][path] for end in ends) if len(ends) > 1 else None,
        )
        for tier in (tiers[:1] if alike else tiers)
        for path in ends[0][tier]
    ]


def _cost(method: str, runs: Runs, target: float) -> Cost:
    cells = [records for _, records in _cells(method, runs)]
    ends = [records[-1] for records in cells]
    megabytes = dict.fromkeys((*KINDS, OTHER), 0.0)
    for end in ends:
        for kind, ways in end.bytes.items():
            megabytes[kind if kind in KINDS else OTHER] += sum(ways.values()) / 1e6 / len(ends)
    local_rounds = [sum(r.devices + len(r.dropped) for r in records) for records in cells]
    metric = metric_of(runs)
    reached = (
        p.seconds for p in curves(runs)[method] if best((p.accuracy, target), metric) == p.accuracy
    )
    return Cost(
        method,
        megabytes,
        statistics.fmean(end.up / 1e6 for end in ends),
        statistics.fmean(end.down / 1e6 for end in ends),
        statistics.fmean(end.clock for end in ends),
        statistics.fmean(
            end.costs["device_flop"] / 1e9 / rounds
            for end, rounds in zip(ends, local_rounds, strict=True)
        ),
        next(reached, None),
    )


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A table, for the terminal or for a report. The first ``left`` columns are names."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left: int

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, box=None, padding=(0, 1))
        for number, column in enumerate(self.header):
            if number < self.left:
                table.add_column(column, no_wrap=True)
            else:
                table.add_column(column, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self, level: int = 2) -> str:
        """For a report: a heading of this level and the table."""
        return f"{'#' * level} {self.title}\n\n" + markdown_table(self.header, self.rows)


def accuracy_grid(found: Summary) -> Grid:
    """A line per method and tier, a column per way to answer."""
    paths = [path for path in LABELS if any(s.path == path for s in found.scores)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    factor, unit = (100, " in %") if found.metric == "accuracy" else (1, "")
    for s in found.scores:
        spread = "" if s.deviation is None else f" ± {factor * s.deviation:.1f}"
        cells.setdefault((s.method, s.tier), {})[s.path] = f"{factor * s.mean:.1f}{spread}"
    rows, above = [], ""
    for (method, tier), answers in cells.items():
        name = "" if method == above else method
        rows.append([name, tier, *(answers.get(path, "") for path in paths)])
        above = method
    spread = f": mean ± standard deviation of {found.seeds} seeds" if found.seeds > 1 else ""
    title = f"{found.metric.capitalize()}{unit}{spread}"
    return Grid(title, ["method", "tier", *(LABELS[path] for path in paths)], rows, 2)


def cost_grid(found: Summary) -> Grid:
    """A line per method: traffic, virtual time and the devices' compute."""
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
            *(figure(cost.megabytes[kind]) for kind in (*kinds, OTHER)),
            figure(cost.up),
            figure(cost.down),
            figure(cost.device_gflop),
            figure(cost.seconds),
            "-" if cost.target_s is None else figure(cost.target_s),
        ]
        for cost in found.costs
    ]
    mean = f"; means of {found.seeds} seeds" if found.seeds > 1 else ""
    article = "an" if found.metric == "accuracy" else "a"
    title = (
        "Traffic of all devices in MB, GFLOP of a device in a round, virtual seconds of the job "
        f"and until {article} {found.metric} of {shown(found.target, found.metric)}{mean}"
    )
    return Grid(title, header, rows, 1)


def figure(value: float) -> str:
    """A number with some three digits, so that small and large ones fit one column."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def accuracy_table(runs: Runs) -> Table:
    """Accuracy, or perplexity, at the end, for the terminal."""
    return accuracy_grid(summary(runs)).rich()


def cost_table(runs: Runs, target: float | None = None) -> Table:
    """What the methods have taken, for the terminal; ``target`` as for :func:`summary`."""
    return cost_grid(summary(runs, target)).rich()
