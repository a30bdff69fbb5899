"""``cutlayer export``: from a PyTorch model to bundles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from edge_sdk import config

if TYPE_CHECKING:
    from torch import Tensor

    from export.writer import BundleIndex


@dataclasses.dataclass(frozen=True)
class TierTable:
    """A tier in ``tiers.toml``: its cut, and how its activations are packed."""

    cut: int
    codec: str = "int8"


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What ``tiers.toml`` may say.

    Attributes:
        classes: number of classes.
        input_shape: shape of one input, without the batch.
        input_dtype: ``float32``, or ``int64`` for token ids.
        input_high: integers are below this.
        optimizer: what the training graphs update with.
        tiers: tiers by name.
    """

    classes: int
    input_shape: list  # type: ignore[type-arg]
    tiers: dict[str, TierTable]
    input_dtype: Literal["float32", "int64"] = "float32"
    input_high: int = 2
    optimizer: Literal["sgd", "adamw"] = "sgd"

    def __post_init__(self) -> None:
        if not all(type(n) is int and n > 0 for n in self.input_shape):
            raise ValueError("input_shape must be a list of positive integers")

    def example(self) -> Tensor:
        """Random inputs of the configured kind."""
        import torch

        generator = torch.Generator().manual_seed(0)
        shape = (8, *self.input_shape)
        if self.input_dtype == "float32":
            return torch.randn(shape, generator=generator)
        return torch.randint(self.input_high, shape, generator=generator)


def export(
    model: Annotated[str, typer.Argument(help="MODULE:FUNCTION that returns a SplitModel.")],
    tiers: Annotated[Path, typer.Option(help="TOML file with the tiers, see README.")],
    out: Annotated[Path, typer.Option(help="Folder to write the bundles to.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, progress to stderr.")
    ] = False,
) -> None:
    """Cut a model per tier and export its training steps, checked against PyTorch."""
    settings = config.load(ExportConfig, tiers)
    from export.build import build_model
    from export.writer import Tier, export_bundles

    console = Console(stderr=as_json, highlight=False)
    with console.status("building the model") as status:
        index = export_bundles(
            build_model(model),
            {name: Tier(t.cut, t.codec) for name, t in settings.tiers.items()},
            out,
            example=settings.example(),
            classes=settings.classes,
            optimizer=settings.optimizer,
            model_path=model,
            overwrite=overwrite,
            progress=lambda line: status.update(f"exporting {line}"),
        )
    if as_json:
        print(json.dumps(describe(index)))
    else:
        console.print(table(index))
        console.print(f"written to {out}")


def describe(index: BundleIndex) -> dict[str, dict[str, Any]]:
    """What was exported, by tier."""
    tiers = {}
    for name, entry in index.tiers.items():
        manifest = index.manifest(name)
        tiers[name] = {
            "cut": entry.cut,
            "codec": entry.codec,
            "parameters": sum(spec.nbytes() // 4 for spec in manifest.parameters),
            "bundle_bytes": sum(manifest.blobs.values()),
            "activation_bytes_per_32": sum(spec.nbytes(batch=32) for spec in manifest.packed),
            "manifest": entry.manifest,
        }
    return tiers


def table(index: BundleIndex) -> Table:
    """What was exported, to look at."""
    result = Table(title="bundles, every graph equal to eager PyTorch")
    for column in ("tier", "cut", "codec", "parameters", "bundle kB", "activations, bytes/example"):
        result.add_column(column, justify="left" if column in ("tier", "codec") else "right")
    for name, d in describe(index).items():
        result.add_row(
            name,
            str(d["cut"]),
            str(d["codec"]),
            f"{d['parameters']:,}",
            f"{d['bundle_bytes'] / 1e3:.0f}",
            f"{d['activation_bytes_per_32'] / 32:.0f}",
        )
    return result
