"""Results of simulated runs: rows for files, and accuracy and costs as means over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_sdk.errors import ConfigError
from edge_sdk.files import why
from edge_sdk.inference.metrics import Metric
from server_hub.methods.registry import simulated_methods
from server_hub.reports.comparison import (
    KINDS,
    OTHER,
    Cost,
    Point,
    Score,
    Summary,
    accuracy_table,
    cost_table,
)
from server_hub.reports.files import write_page, write_rows
from server_hub.reports.plots import draw_comparison
from server_hub.reports.table import Table
from server_hub.reports.values import best
from server_hub.simulation.job import Job
from server_hub.storage.run_folder import RoundRecord

ROW_KEYS = (
    "method", "seed", "data", "partition", "tier", "path", "accuracy", "up_bytes", "down_bytes",
    "sim_seconds", "rounds",
)  # fmt: skip
"""Keys of a row of :func:`rows_of`; for a model of tokens, ``perplexity`` replaces ``accuracy``."""

Runs = Mapping[tuple[str, int], tuple[Job, Sequence[RoundRecord]]]
"""The job and its rounds, by method and seed."""


# --- one run --------------------------------------------------------------------------------------


def rows_of(method: str, job: Job, records: Sequence[RoundRecord]) -> list[dict[str, object]]:
    """Return a row per tier and path, with the accuracy or perplexity of the last measured round.

    ``up_bytes`` and ``down_bytes`` are the traffic of all devices, ``sim_seconds`` is in virtual
    seconds; all three count from the start to the end of the run.

    Args:
        method: name of the method.
        job: the job of the run.
        records: rounds of the run.

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
    """Return the name of the data source, without folder and suffix."""
    return Path(job.data.source).stem or job.data.source


def partition_name(job: Job) -> str:
    """Return the partition with its parameter, such as ``dirichlet 0.3`` or ``shards 2``."""
    table = job.partition
    if table.kind in ("dirichlet", "length"):
        return f"{table.kind} {table.alpha:g}"
    return f"shards {table.classes_per_client}" if table.kind == "shards" else table.kind


def fleet_accuracy(
    job: Job, accuracy: Mapping[str, Mapping[str, float]], metric: Metric = "accuracy"
) -> float:
    """Return the mean over the clients, each with the best path of its tier.

    Args:
        job: gives the number of clients of a tier. A tier that is not in the job is the server
            that holds all data; it counts as one client.
        accuracy: accuracy or perplexity by tier and path.
        metric: whether ``accuracy`` has accuracy or perplexity.
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
            f"method {method!r} with seed {job.seed}: no round was measured; finish the run"
        )
    return found


# --- several methods and seeds --------------------------------------------------------------------


def summary(runs: Runs, target: float | None = None) -> Summary:
    """Summarise runs as means over the seeds.

    Args:
        runs: at least one run.
        target: accuracy or perplexity to reach; None for the best that every method reaches.

    Raises:
        ConfigError: a run has no measured round.
    """
    methods = list(dict.fromkeys(method for method, _ in runs))
    if target is None:
        target = common_target(runs)
    return Summary(
        [score for method in methods for score in _scores(method, runs)],
        [_cost(method, runs, target) for method in methods],
        curves(runs),
        target,
        len({seed for _, seed in runs}),
        metric_of(runs),
    )


def metric_of(runs: Runs) -> Metric:
    """Return the metric of the runs, which all have the same model."""
    _, records = next(iter(runs.values()))
    return records[-1].metric


def common_target(runs: Runs) -> float:
    """Return the best accuracy, or perplexity, that every method's mean over the seeds reaches."""
    metric = metric_of(runs)
    ends = [best((p.accuracy for p in curve), metric) for curve in curves(runs).values()]
    return min(ends) if metric == "accuracy" else max(ends)


def curves(runs: Runs) -> dict[str, list[Point]]:
    """Return, by method, the points of the rounds that were measured with every seed."""
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


# --- tables and files -----------------------------------------------------------------------------


def fleet_table(job: Job) -> Table:
    """Return a table of the tiers: clients, cut, compute, link, and times online and offline.

    Empty columns are left out.
    """
    columns: dict[str, list[float | None]] = {
        "clients": [t.clients for t in job.tiers.values()],
        "cut": [t.cut for t in job.tiers.values()],
        "GFLOPS": [t.gflops for t in job.tiers.values()],
        "Mbit/s up": [t.uplink_mbit for t in job.tiers.values()],
        "Mbit/s down": [t.downlink_mbit for t in job.tiers.values()],
        "latency, ms": [t.latency_ms or None for t in job.tiers.values()],
        "loss, %": [100 * t.loss or None for t in job.tiers.values()],
        "online, s": [t.online_s for t in job.tiers.values()],
        "offline, s": [t.offline_s if t.online_s else None for t in job.tiers.values()],
    }
    kept = {name: values for name, values in columns.items() if values.count(None) < len(values)}
    rows = [
        [tier, *("" if value is None else f"{value:g}" for value in values)]
        for tier, *values in zip(job.tiers, *kept.values(), strict=True)
    ]
    return Table(f"{job.clients} devices", ["tier", *kept], rows)


def write_comparison(folder: Path, runs: Runs, target: float | None = None) -> None:
    """Write ``results.json``, ``report.md`` and ``comparison.png``.

    Args:
        folder: folder for the files; it is created if it is missing.
        runs: job and rounds by method and seed.
        target: accuracy or perplexity to reach; None for the best that every method reaches.

    Raises:
        ConfigError: a run has no measured round, or the folder cannot be written.
    """
    found = summary(runs, target)
    job = next(iter(runs.values()))[0]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(seed for _, seed in runs))
    parts = [
        f"# {data_name(job)}, {partition_name(job)}: {job.rounds.count} rounds, {job.clients} "
        f"devices",
        f"Model `{job.model}`; {job.rounds.per_round or job.clients} devices in a round; "
        f"seeds {seeds}.",
        accuracy_table(found).markdown(),
        cost_table(found).markdown(),
        f"![{found.metric} against rounds, traffic and time, and by tier](comparison.png)",
    ]
    rows = [row for (method, _), run in runs.items() for row in rows_of(method, *run)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "results.json", rows)
        draw_comparison(found, folder / "comparison.png", list(simulated_methods()))
        write_page(folder / "report.md", parts)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {why(error)}") from error
