"""``cutlayer model``: writes the trained model of a run in formats that other software opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from server_hub.reports.table import Table

if TYPE_CHECKING:
    from export.formats.card import Card

model = typer.Typer(
    help="Write the trained model of a run in formats that other software opens.",
    no_args_is_help=True,
)


@model.callback()
def _group() -> None:
    """Keep ``export`` a subcommand, though it is the only one."""


@model.command("export")
def export_model(
    run: Annotated[Path, typer.Argument(help="Folder of a finished or running job.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="onnx, onnx-fp16, onnx-int8, executorch, executorch-int8, executorch-int4, "
            "transformers, peft, safetensors or bundles; may be repeated.",
            show_default="onnx",
        ),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(help="Write what devices of this tier hold.", show_default="the whole model"),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="Output to write: aux.DEPTH or head; may be repeated.", show_default="all"
        ),
    ] = None,
    bases: Annotated[
        int | None,
        typer.Option(help="Number of base networks to mix, the best.", show_default="all"),
    ] = None,
    bundles: Annotated[
        Path | None, typer.Option(help="Bundles of the run.", show_default="as the run says")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help=".npz with x and y to measure with.", show_default="those of the run"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Largest batch of files for ExecuTorch.")] = 1,
    length: Annotated[
        int, typer.Option(help="Largest number of tokens in files for ExecuTorch.")
    ] = 64,
    base: Annotated[
        str | None,
        typer.Option(
            help="Name of the original model in the files of peft.", show_default="its source"
        ),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(help="Largest loss of accuracy, or growth of perplexity, by rounded weights."),
    ] = 0.01,
    allow_loss: Annotated[
        bool, typer.Option(help="Write files even if they lose more than --max-loss.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, progress to stderr.")
    ] = False,
) -> None:
    """Write a trained model with a card, checked in the runtimes that open it: docs/ship.md."""
    from export.formats.card import FIGURES
    from export.formats.ship import Choice, ship
    from export.out_folder import check_out
    from server_hub.storage.trained_run import TrainedRun

    console = Console(stderr=as_json, highlight=False, markup=False)
    choice = Choice(
        formats or ["onnx"], tier, head or (), batch, length, base, max_loss, allow_loss
    )
    check_out(out, overwrite, mark=FIGURES)
    with console.status("reading the run") as status:
        found = TrainedRun.read(run, bundles)
        trained = found.trained(tier, bases, held_out, whole=set(choice.formats) == {"bundles"})
        card = ship(
            trained,
            choice,
            out,
            overwrite=overwrite,
            progress=lambda line: status.update(f"writing {line}"),
        )
    if as_json:
        print(json.dumps({"out": str(out), **card.to_json()}))
        return
    console.print(table(card).rich())
    for note in card.notes:
        console.print(note, soft_wrap=True)
    console.print(f"written to {out}, with a model card in README.md", soft_wrap=True)


def table(card: Card) -> Table:
    """A row for each output of each file."""
    from export.formats.card import shown

    rows = []
    for file in card.files:
        for head in file.heads or ("-",):
            first = head in ("-", *file.heads[:1])
            score = shown(card.metric, file.scores[head]) if head in file.scores else "not measured"
            latency = "-" if file.latency_ms is None else f"{file.latency_ms:.2f}"
            rows.append(
                [
                    file.path if first else "",
                    head,
                    file.opened_by if first else "",
                    f"{file.size / 1e3:,.0f}" if first else "",
                    score if file.heads else "-",
                    latency if first else "",
                ]
            )
    header = ["file", "output", "opened by", "kB", card.metric, "ms"]
    return Table("Trained model", header, rows, 3)
