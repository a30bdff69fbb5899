"""A plan as tables on the console."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from export.planning.plan import Plan
from export.steps.graph_names import NEEDS


def cuts_table(plan: Plan) -> Table:
    """Table of the costs of every cut that do not depend on the tier."""
    rows = plan.to_json()["cuts"]
    several = len({_exported_as(row) for row in rows}) > 1
    text = any(row.get("tokens", 1) > 1 for row in rows)
    table = Table(title="what a cut costs, with the head at the cut", title_justify="left")
    table.add_column("cut", justify="right")
    if several:
        table.add_column("exported as", no_wrap=True)
    headers = ["trained", "frozen", "MFLOP/\nexample", "bundle\nMB"]
    headers += [f"sent, B/\n{'token' if text else 'example'}", "update\nMB"]
    for header in headers:
        table.add_column(header, justify="right")
    seen = set()
    for row in rows:
        if (row["cut"], _exported_as(row)) in seen:
            continue
        seen.add((row["cut"], _exported_as(row)))
        cells = [str(row["cut"]), *([_exported_as(row)] if several else [])]
        if "error" in row:
            cells.append("impossible")
        else:
            cells += [
                _compact(row["parameters"]),
                _compact(row["frozen"]),
                _number(row["flops"] / 1e6),
                _number(row["bundle_bytes"] / 1e6),
                _number(row["activation_bytes"]),
                _number(row["update_bytes"] / 1e6),
            ]
        table.add_row(*cells)
    return table


def steps_table(plan: Plan) -> Table:
    """Table of the memory of a training step and the seconds of an epoch, by cut and tier.

    Seconds are left out if no tier gives the speeds that they follow from.
    """
    rows = plan.to_json()["cuts"]
    timed = _timed(plan)
    table = Table(title="what a tier needs for a cut, by itself", title_justify="left")
    kinds = dict.fromkeys(", ".join(row["graph_flops"]) for row in rows if "error" not in row)
    table.caption = "a step runs " + " or ".join(kinds) if kinds else None
    table.caption_justify = "left"
    table.add_column("cut", justify="right")
    for name in plan.settings.tiers:
        table.add_column(f"{name}\nstep MB", justify="right")
        if timed:
            table.add_column("\nepoch s", justify="right")
    for cut in dict.fromkeys(row["cut"] for row in rows):
        cells = [str(cut)]
        for name in plan.settings.tiers:
            mine = [row for row in rows if row["cut"] == cut and name in row["epoch_s"]]
            cells.append(_number(mine[0]["memory_bytes"] / 1e6 if mine else None))
            if timed:
                cells.append(_number(mine[0]["epoch_s"][name] if mine else None))
        table.add_row(*cells)
    return table


def tiers_table(plan: Plan) -> Table:
    """Table of the cut of every tier, with its cost and the reason."""
    table = Table(title="cuts of the tiers, with the heads of shallower ones", title_justify="left")
    table.add_column("tier")
    timed = _timed(plan)
    for header in ("cut", "heads at", "step MB", *(["epoch s"] if timed else [])):
        table.add_column(header, justify="right")
    table.add_column("why", overflow="fold")
    for name, tier in plan.to_json()["tiers"].items():
        cost = tier["cost"] or {}
        memory = cost.get("memory_bytes")
        table.add_row(
            name,
            "-" if tier["cut"] is None else str(tier["cut"]),
            ", ".join(map(str, cost.get("heads", ["-"]))),
            _number(None if memory is None else memory / 1e6),
            *([_number(tier["epoch_s"])] if timed else []),
            tier["reason"],
        )
    return table


def failures(plan: Plan) -> list[str]:
    """A line for every cut that cannot be exported or measured, with the reason."""
    rows = [row for row in plan.to_json()["cuts"] if "error" in row]
    lines = [
        f"cut {row['cut']}, {_exported_as(row)}, is impossible: {row['error']}" for row in rows
    ]
    return list(dict.fromkeys(lines))


def _timed(plan: Plan) -> bool:
    """Whether a tier gives a speed."""
    tiers = plan.settings.tiers.values()
    return any(t.gflops is not None or t.uplink_mbit is not None for t in tiers)


def _exported_as(row: dict[str, Any]) -> str:
    """The settings in which tiers can differ, but for the batch."""
    extras = ["int8 answers"] if row["precision"] == "int8" else []
    needed = {name for graph in row["graphs"] for name in NEEDS[graph]}
    extras += [graph for graph in row["graphs"] if graph not in needed]
    return ", ".join([f"{row['runtime']} {row['codec']}", *extras])


def _compact(count: int) -> str:
    """A count of parameters: in full below a million, else in millions."""
    return f"{count:,}" if count < 1_000_000 else f"{_number(count / 1e6)} M"


def _number(value: float | None) -> str:
    """A number with three significant digits, from 100 on as an integer; ``-`` for None."""
    if value is None:
        return "-"
    for decimals, least in ((0, 100), (1, 10), (2, 1), (3, 0.1)):
        if value >= least:
            return f"{value:,.{decimals}f}"
    return f"{value:.3g}"
