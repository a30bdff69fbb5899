"""``cutlayer plan``: shows the cost of every cut, and the deepest cut that each tier can carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from edge_sdk.errors import ConfigError
from export.bundles.tier_table import TiersConfig
from export.cli.export import MODEL_HELP

if TYPE_CHECKING:
    pass

TIERS_HELP = "TOML file with the tiers and their limits, see docs/plan.md."


def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tiers: Annotated[Path, typer.Option(help=TIERS_HELP)],
    cuts: Annotated[
        str | None, typer.Option(help="Measure these cuts only, as 1,2,4.", show_default="all")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the plan to a .png file.", metavar="FILE.png")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, progress to stderr.")
    ] = False,
) -> None:
    """Measure the cost of every cut of a model, and find the deepest cut for each tier.

    For each cut it writes the bundle that cutlayer export would write with the same tiers.toml,
    without comparing it with PyTorch, and runs its training step. This takes seconds to a minute
    per cut. Tiers without a cut get the deepest one within memory_mb and max_epoch_s.
    """
    settings = TiersConfig.read(tiers)
    wanted = None if cuts is None else parse_cuts(cuts)
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture {picture}: the name must end in .png")
    if picture is not None and not picture.absolute().parent.is_dir():
        raise ConfigError(f"--picture {picture}: there is no such folder")
    from export.bundles.model_source import build_model
    from export.planning.picture import draw
    from export.planning.planner import Planner
    from export.planning.table import cuts_table, failures, steps_table, tiers_table

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
        with Planner(settings, split, example, classes, report) as planner:
            result = planner.plan(wanted)
    if picture is not None:
        draw(result, picture)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    console = Console(highlight=False, markup=False)
    console.print(cuts_table(result))
    for line in failures(result):
        console.print(line, soft_wrap=True)
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
