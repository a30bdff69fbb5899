"""The rounds of a run as tables and lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edge_sdk.inference.metrics import Metric
from edge_sdk.protocol.messages import DIVERGED
from server_hub.reports.table import Table
from server_hub.reports.values import LABELS, bases, best, megabytes, percent, shown
from server_hub.storage.run_folder import RoundRecord

_NAMED = 8
"""Devices up to which the table of rounds has a column with their cuts."""


def rounds_table(records: Sequence[RoundRecord], last: int | None = None) -> Table:
    """A row per round: time, devices, losses, what was measured, and traffic since the start.

    What was measured is the accuracy or perplexity of each tier, of the device alone and in the
    tier's best way to answer: on the held-out examples, or without these the mean of what devices
    say. With base networks it is that of the best 1, 2, 4 and so on. A
    column that is empty in every round is left out; the cuts of the devices are shown where
    they have moved.

    Args:
        records: all rounds so far.
        last: how many rounds to show, the last ones; None for all.
    """
    shown_records = records if last is None else records[-last:]
    columns: dict[str, list[str]] = {
        "round": [str(r.round) for r in shown_records],
        "s": [f"{r.clock:.1f}" for r in shown_records],
        "devices": [str(r.devices) for r in shown_records],
        "dropped": [str(len(r.dropped) or "") for r in shown_records],
        "local loss": [_loss(r.local_loss) for r in shown_records],
        "trunk loss": [_loss(r.trunk_loss) for r in shown_records],
    }
    title, measured = _measured(records, shown_records)
    columns |= measured
    if any(r.moves for r in records):
        columns |= _cuts(shown_records)
    columns |= {
        "MB up": [f"{r.up / 1e6:.1f}" for r in shown_records],
        "MB down": [f"{r.down / 1e6:.1f}" for r in shown_records],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return Table(title, list(columns), list(zip(*columns.values(), strict=True)), 0)


def _measured(
    records: Sequence[RoundRecord], shown_records: Sequence[RoundRecord]
) -> tuple[str, dict[str, list[str]]]:
    """The title of the table of rounds, and its columns with what was measured."""
    last = next((r for r in reversed(records) if r.accuracy or r.device_means), None)
    if last is None:
        return "Rounds", {}
    metric = "accuracy in %" if last.metric == "accuracy" else last.metric
    if last.mixed:
        counts = [count for count in last.mixed if _is_power_of_two(int(count))]
        return f"Rounds: {metric} of the best base networks, mixed", {
            bases(int(count)): [
                _cell(r.mixed[count], r.metric) if count in r.mixed else "" for r in shown_records
            ]
            for count in counts
        }
    held_out = any(r.accuracy for r in records)
    figures = [r.accuracy if held_out else r.device_means for r in records]
    tiers = list(dict.fromkeys(tier for each in figures for tier in each))
    columns = {
        tier: [
            _paths(each[tier], last.metric) if tier in each else ""
            for each in figures[len(records) - len(shown_records) :]
        ]
        for tier in tiers
    }
    where = "" if held_out else ", on what devices keep back"
    paths = {path for each in figures for tier in each.values() for path in tier}
    if len(paths) == 1:
        return f"Rounds: {metric} by tier, {LABELS[paths.pop()]}{where}", columns
    two = "device alone/best path" if "device_alone" in paths else "best path"
    return f"Rounds: {metric} by tier, {two}{where}", columns


def _paths(paths: Mapping[str, float], metric: Metric) -> str:
    """A tier's accuracy or perplexity: of the device alone, and in its best way to answer."""
    values = [best(paths.values(), metric)]
    if "device_alone" in paths and len(paths) > 1:
        values.insert(0, paths["device_alone"])
    return "/".join(_cell(value, metric) for value in values)


def _cell(value: float, metric: Metric) -> str:
    """A measured value without its unit, which the title has."""
    return percent(value) if metric == "accuracy" else shown(value, metric)


def _cuts(records: Sequence[RoundRecord]) -> dict[str, list[str]]:
    """The column with the cuts of the devices, in the order of their names."""
    devices = sorted({device for r in records for device in r.cuts}, key=natural)
    if len(devices) > _NAMED:
        return {}
    return {"cuts": [" ".join(str(r.cuts.get(d, "-")) for d in devices) for r in records]}


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``phone-2`` before ``phone-10``."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def round_line(record: RoundRecord) -> str:
    """A round in a line, with each tier's ensemble; its best way to answer if it has none."""
    metric = record.metric
    measured = "  ".join(
        f"{tier}{where} {shown(paths.get('ensemble', best(paths.values(), metric)), metric)}"
        for where, tiers in (("", record.accuracy), (" on devices", record.device_means))
        for tier, paths in tiers.items()
    )
    if measured and metric == "perplexity":
        measured = f"perplexity {measured}"
    local = "" if record.local_loss is None else f"  loss {record.local_loss:.3f}"
    trunk = "" if record.trunk_loss is None else f"  trunk loss {record.trunk_loss:.3f}"
    many = sum(DIVERGED in reason for reason in record.dropped.values())
    diverged = f"  {DIVERGED} on {many}" if many else ""
    return (
        f"round {record.round:3d}  {record.devices} devices{local}"
        f"{diverged}{trunk}  {measured}  {record.seconds:.1f} s"
    )


def move_lines(record: RoundRecord) -> list[str]:
    """The moves of cuts after a round, a line for each."""
    return [
        f"{m['device']} goes from cut {m['cut']} to {m['to']}: {m['reason']}" for m in record.moves
    ]


def moves_table(records: Sequence[RoundRecord]) -> Table:
    """A row per move of a cut, with its reason."""
    rows = [
        [m["device"], m["reason"], str(r.round), str(m["cut"]), str(m["to"])]
        for r in records
        for m in r.moves
    ]
    return Table("Moves of cuts", ["device", "reason", "after round", "cut", "to"], rows, 2)


def mixture_table(record: RoundRecord) -> Table:
    """The accuracy or perplexity of the best 1, 2, 3 and so on base networks, mixed."""
    row = [record.metric, *(shown(value, record.metric) for value in record.mixed.values())]
    return Table("The best base networks, mixed", ["bases", *record.mixed], [row])


def devices_table(record: RoundRecord) -> Table:
    """What devices say about examples that they keep back: a row per tier and way to answer."""
    rows = [
        [
            tier,
            LABELS[path],
            *(shown(figures[name], record.metric) for name in ("mean", "p10", "p50", "p90")),
            str(said["devices"]),
            str(said["labels"]),
        ]
        for tier, said in record.on_devices["tiers"].items()
        for path, figures in said["paths"].items()
    ]
    title = f"{record.metric.capitalize()} on what devices keep back, as they say"
    header = ["tier", "path", "mean", "10 %", "median", "90 %", "devices", "labels"]
    return Table(title, header, rows, 2)


def devices_remark(record: RoundRecord) -> str:
    """How many devices have answered, and how many are left out."""
    said = record.on_devices
    return (
        f"After round {record.round}, {said['answered']} of {said['asked']} devices that were "
        f"asked have evaluated the model; {said['silent']} did not answer in time. "
        f"{said['without']} have "
        "nothing kept back, or cannot evaluate. Means are weighted by labels, within bounds; the "
        "other columns are quantiles over devices. The hub cannot check these figures."
    )


def traffic_table(traffic: Mapping[str, Mapping[str, int]]) -> Table:
    """A row per kind of message, the largest first, then the sum."""
    kinds = sorted(traffic, key=lambda kind: -sum(traffic[kind].values()))
    rows = [[kind, *(megabytes(traffic[kind][way]) for way in ("up", "down"))] for kind in kinds]
    total = [sum(sizes[way] for sizes in traffic.values()) for way in ("up", "down")]
    rows.append(["all", *map(megabytes, total)])
    return Table("Traffic of all devices in MB", ["message", "up", "down"], rows)
