"""``cutlayer plan``: what every cut costs, and the deepest cut that each tier can carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from edge_sdk.errors import ConfigError
from export.cli import MODEL_HELP
from export.tiers import TiersConfig

if TYPE_CHECKING:
    from export.plan import Plan

TIERS_HELP = "TOML file with the tiers and their limits, see docs/plan.md."


def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tiers: Annotated[Path, typer.Option(help=TIERS_HELP)],
    cuts: Annotated[
        str | None, typer.Option(help="Look at these cuts only, as 1,2,4; all of them if missing.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the plan, too: a .png file.", metavar="FILE.png")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, progress to stderr.")
    ] = False,
) -> None:
    """Say what every cut of a model costs, and the deepest cut that each tier can carry.

    Memory and time are measured: every cut's training step is lowered and run, which takes
    seconds to a minute for each.
    """
    settings = TiersConfig.read(tiers)
    wanted = None if cuts is None else parse_cuts(cuts)
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture {picture}: the name must end in .png")
    if picture is not None and not picture.absolute().parent.is_dir():
        raise ConfigError(f"--picture {picture}: there is no such folder")
    from export.build import build_model
    from export.plan import Planner

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("building the model", total=None)

        def report(text: str, done: float | None) -> None:
            total = None if done is None else 1.0
            bar.update(task, description=text, completed=done or 0.0, total=total)

        split = build_model(model, settings.make_lora())
        example, classes = settings.example(split)
        with Planner(split, example, classes, settings.optimizer, report) as planner:
            result = planner.plan(settings.tiers, wanted)
    if picture is not None:
        draw(result, picture)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    console = Console(highlight=False, markup=False)
    console.print(cuts_table(result))
    console.print(tiers_table(result))
    if picture is not None:
        console.print(f"drawn to {picture}", soft_wrap=True)


def parse_cuts(text: str) -> list[int]:
    """``1,2,4`` as numbers. Raises :class:`ConfigError`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--cuts {text!r} must be numbers with commas, as 1,2,4") from None


def cuts_table(plan: Plan) -> Table:
    """What every cut costs."""
    rows = plan.to_json()["cuts"]
    timed = [name for name in plan.tiers if any(_of(row, name) is not None for row in rows)]
    several = len({_variant(row) for row in rows}) > 1
    text = any(row.get("tokens", 1) > 1 for row in rows)
    table = Table(title="what a cut costs, with the head at the cut", title_justify="left")
    table.add_column("cut", justify="right")
    if several:
        table.add_column("exported as")
    headers = ["trained", "frozen", "MFLOP/\nexample", "step\nMB", "bundle\nMB"]
    headers += [f"act. B/\n{'token' if text else 'example'}", "update\nMB"]
    for header in (*headers, *(f"epoch s\n{name}" for name in timed)):
        table.add_column(header, justify="right")
    last = None
    for row in rows:
        if last is not None and several and row["cut"] != last:
            table.add_section()
        cells = [str(row["cut"]) if row["cut"] != last else ""]
        last = row["cut"]
        if several:
            cells.append(_variant(row))
        if "error" in row:
            cells.append("cannot be exported")
        else:
            cells += [
                f"{row['parameters']:,}",
                f"{row['frozen']:,}",
                _number(row["flops"] / 1e6),
                _number(row["memory_bytes"] / 1e6),
                _number(row["bundle_bytes"] / 1e6),
                _number(row["activation_bytes"]),
                _number(row["update_bytes"] / 1e6),
                *(_number(_of(row, name)) for name in timed),
            ]
        table.add_row(*cells)
    return table


def tiers_table(plan: Plan) -> Table:
    """The cut of every tier, with what it takes there and the reason."""
    table = Table(title="tiers, with the heads of all shallower tiers", title_justify="left")
    table.add_column("tier")
    for header in ("cut", "heads at", "step MB", "epoch s"):
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
            _number(tier["epoch_s"]),
            tier["reason"],
        )
    return table


def _variant(row: dict[str, Any]) -> str:
    return f"{row['runtime']} {row['codec']} ×{row['batch']}"


def _of(row: dict[str, Any], tier: str) -> float | None:
    """Seconds of the tier's epoch; None if this row is not about it, or nothing says how fast."""
    seconds: float | None = row["epoch_s"].get(tier)
    return seconds


def _number(value: float | None) -> str:
    """At least three digits that mean something, and no more behind the point than that takes."""
    if value is None:
        return "-"
    for decimals, least in ((0, 100), (1, 10), (2, 1), (3, 0.1)):
        if value >= least:
            return f"{value:,.{decimals}f}"
    return f"{value:.3g}"


def draw(plan: Plan, path: Path) -> None:
    """Memory, time and activations over the cuts, with the tiers' limits and their cuts.

    A mark is what the tier's cut takes, with the heads of the shallower tiers.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError(
            "--picture needs matplotlib: pip install 'cutlayer[hub]', or leave it out"
        ) from error
    content = plan.to_json()
    rows = [row for row in content["cuts"] if "error" not in row]
    colors = {name: f"C{i % 10}" for i, name in enumerate(plan.tiers)}
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    memory, work, sent = figure.subplots(1, 3)
    timed = any(seconds is not None for row in rows for seconds in row["epoch_s"].values())
    text = any(row["tokens"] > 1 for row in rows)
    memory.set(title="memory of a training step", ylabel="MB")
    work.set(title="local epoch", ylabel="s") if timed else work.set(
        title="training step", ylabel="MFLOP per example"
    )
    sent.set(title="packed activations", ylabel=f"bytes per {'token' if text else 'example'}")
    for name, table in plan.tiers.items():
        color, tier = colors[name], content["tiers"][name]
        mine = [row for row in rows if name in row["epoch_s"]]
        places = [row["cut"] for row in mine]
        marked = tier["cost"] if tier["cost"] and "error" not in tier["cost"] else None
        lines = (
            (memory, [row["memory_bytes"] / 1e6 for row in mine], "memory_bytes", 1e-6),
            (sent, [row["activation_bytes"] for row in mine], "activation_bytes", 1.0),
        )
        for axis, values, key, scale in lines:
            axis.plot(places, values, color=color, alpha=0.7, label=name)
            if marked:
                axis.plot(marked["cut"], marked[key] * scale, "o", color=color, markersize=9)
        if timed:
            values = [row["epoch_s"][name] for row in mine]
            if None not in values:
                work.plot(places, values, color=color, alpha=0.7, label=name)
            if marked and tier["epoch_s"] is not None:
                work.plot(marked["cut"], tier["epoch_s"], "o", color=color, markersize=9)
        else:
            work.plot(places, [row["flops"] / 1e6 for row in mine], color=color, alpha=0.7)
            if marked:
                work.plot(marked["cut"], marked["flops"] / 1e6, "o", color=color, markersize=9)
        for axis, limit in ((memory, table.memory_mb), (work, table.max_epoch_s)):
            if limit is not None and not (axis is work and not timed):
                axis.axhline(limit, color=color, linestyle=":")
    for axis in (memory, work, sent):
        axis.set(xlabel="cut", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels) or 1,
        title="line: by cut    dots: chosen, with all heads    dotted: the tier's limit",
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
