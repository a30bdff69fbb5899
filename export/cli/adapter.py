"""``cutlayer adapter``: converts PEFT files to weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from edge_sdk.errors import ConfigError
from export.cli.export import MODEL_HELP, TIERS_HELP

if TYPE_CHECKING:
    from export.cutting.split_model import SplitModel

adapter = typer.Typer(
    help="Convert PEFT files to weights for an export; cutlayer model export writes them.",
    no_args_is_help=True,
)

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object at the end, progress to stderr.")
]


@adapter.callback()
def _group() -> None:
    """Keep ``import`` a subcommand, though it is the only one."""


@adapter.command("import")
def import_adapter(
    folder: Annotated[Path, typer.Argument(help="Folder with a PEFT adapter.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    tiers: Annotated[
        Path, typer.Option(help=f"{TIERS_HELP} Its table lora gives rank and targets.")
    ],
    out: Annotated[Path, typer.Option(help="Weights to write, for cutlayer export --weights.")],
    as_json: JsonOption = False,
) -> None:
    """Convert a PEFT adapter to weights that an export starts from."""
    from export.bundles.tier_table import TiersConfig

    lora = TiersConfig.read(tiers).make_lora()
    if lora is None:
        raise ConfigError(
            f"{tiers} has no [lora]; set rank and alpha there, and targets if need be"
        )
    if out.exists():
        raise ConfigError(f"{out} exists; choose another file")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {out.absolute().parent} to write {out.name} to")
    from export.adapters_lora.lora import unify
    from export.adapters_lora.peft_format import load_adapter
    from export.bundles.model_source import build_model

    console = Console(stderr=as_json, highlight=False, markup=False)
    with console.status("building the model"):
        split = build_model(model, lora)
        load_adapter(split, folder)
        unify(split, lora)
        split.save(out)
    _report(split, out, as_json)


def _report(model: SplitModel, out: Path, as_json: bool) -> None:
    """Print the number of adapted modules, their ranks and the number of parameters."""
    from export.adapters_lora.lora import ADAPTER, adapted_modules

    modules = adapted_modules(model)
    ranks = sorted({int(module.r[ADAPTER]) for module in modules.values()})
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    if as_json:
        said = {"out": str(out), "modules": len(modules), "ranks": ranks, "parameters": parameters}
        print(json.dumps(said))
        return
    Console(highlight=False, markup=False).print(
        f"adapters of {len(modules)} modules, rank {', '.join(map(str, ranks))}, "
        f"{parameters:,} parameters, written to {out}",
        soft_wrap=True,
    )
