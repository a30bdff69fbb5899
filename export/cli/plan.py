"""``cutlayer plan``: shows the cost of every cut, and the deepest cut that each tier can carry."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from edge_sdk.errors import ConfigError
from edge_sdk.files import why
from export.bundles.tier_table import TiersConfig, TierTable
from export.cli.export import MODEL_HELP

if TYPE_CHECKING:
    from export.planning.plan import Plan

TIERS_HELP = "TOML file with the tiers and their limits, see docs/plan.md."


def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tiers: Annotated[Path, typer.Option(help=TIERS_HELP)],
    cuts: Annotated[
        str | None, typer.Option(help="Measure these cuts only, as 1,2,4.  [default: all]")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the plan to a .png file.", metavar="FILE.png")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, progress to stderr.")
    ] = False,
) -> None:
    """Measure the cost of every cut of a model, and find the deepest cut for each tier.

    The training step of each cut is lowered and run, which takes seconds to a minute per cut.
    """
    settings = TiersConfig.read(tiers)
    wanted = None if cuts is None else parse_cuts(cuts)
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture {picture}: the name must end in .png")
    if picture is not None and not picture.absolute().parent.is_dir():
        raise ConfigError(f"--picture {picture}: there is no such folder")
    from export.bundles.model_source import build_model
    from export.planning.plan import Planner

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
    console.print(steps_table(result))
    console.print(tiers_table(result))
    if picture is not None:
        console.print(f"drawn to {picture}", soft_wrap=True)


def parse_cuts(text: str) -> list[int]:
    """Parse ``1,2,4``; raises :class:`ConfigError` if a part is not a number."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--cuts {text!r} must be numbers with commas, as 1,2,4") from None


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
    """Table of the memory of a training step and the seconds of an epoch, by cut and tier."""
    rows = plan.to_json()["cuts"]
    table = Table(title="what a tier needs for a cut, by itself", title_justify="left")
    table.add_column("cut", justify="right")
    for name in plan.tiers:
        table.add_column(f"{name}\nMB", justify="right")
        table.add_column("\nepoch s", justify="right")
    for cut in dict.fromkeys(row["cut"] for row in rows):
        cells = [str(cut)]
        for name in plan.tiers:
            mine = [row for row in rows if row["cut"] == cut and name in row["epoch_s"]]
            cells.append(_number(mine[0]["memory_bytes"] / 1e6 if mine else None))
            cells.append(_number(mine[0]["epoch_s"][name] if mine else None))
        table.add_row(*cells)
    return table


def tiers_table(plan: Plan) -> Table:
    """Table of the cut of every tier, with its cost and the reason."""
    table = Table(title="cuts of the tiers, with the heads of shallower ones", title_justify="left")
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


def _exported_as(row: dict[str, Any]) -> str:
    return f"{row['runtime']} {row['codec']}"


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


@dataclass(frozen=True)
class _Panel:
    """A panel of the picture.

    Attributes:
        title: title of the panel.
        unit: unit of the values.
        value: value of a cost and its seconds per epoch; None if there is none.
        limit: limit of a tier for the value; None if there is none.
    """

    title: str
    unit: str
    value: Callable[[dict[str, Any], float | None], float | None]
    limit: Callable[[TierTable], float | None] = lambda table: None


def _panels(rows: list[dict[str, Any]]) -> list[_Panel]:
    timed = any(seconds is not None for row in rows for seconds in row["epoch_s"].values())
    unit = "token" if any(row["tokens"] > 1 for row in rows) else "example"
    return [
        _Panel(
            "memory of a training step",
            "MB",
            lambda cost, _: cost["memory_bytes"] / 1e6,
            lambda table: table.memory_mb,
        ),
        _Panel("local epoch", "s", lambda _, seconds: seconds, lambda table: table.max_epoch_s)
        if timed
        else _Panel("training step", "MFLOP per example", lambda cost, _: cost["flops"] / 1e6),
        _Panel("packed activations", f"bytes per {unit}", lambda cost, _: cost["activation_bytes"]),
    ]


def draw(plan: Plan, path: Path) -> None:
    """Draw memory, time and activations over the cuts, with the tiers' limits and cuts.

    A dot marks the cost of a tier's cut with the heads of the shallower tiers.

    Args:
        plan: plan to draw.
        path: ``.png`` file to write.

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
    panels = _panels(rows)
    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for panel, axis in zip(panels, axes, strict=True):
        for i, (name, table) in enumerate(plan.tiers.items()):
            # lines that coincide have different widths
            color, width = f"C{i % 10}", 1.5 + 1.5 * (len(plan.tiers) - 1 - i)
            points = [
                (row["cut"], value)
                for row in rows
                if (value := panel.value(row, row["epoch_s"].get(name))) is not None
                and name in row["epoch_s"]
            ]
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, color=color, linewidth=width, alpha=0.7, label=name)
            tier = content["tiers"][name]
            if tier["cost"] is not None and "error" not in tier["cost"]:
                value = panel.value(tier["cost"], tier["epoch_s"])
                if value is not None:
                    axis.plot(tier["cut"], value, "o", color=color, markersize=9, zorder=3)
            limit = panel.limit(table)
            if limit is not None:
                axis.axhline(limit, color=color, linestyle=":")
        axis.set(title=panel.title, xlabel="cut", ylabel=panel.unit, ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        title="line: by cut    dot: chosen, with all heads    dotted: the tier's limit",
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {why(error)}") from error
