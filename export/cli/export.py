"""``cutlayer export``: exports a PyTorch model as bundles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_sdk.errors import ConfigError
from export.bundles.tier_table import TiersConfig

if TYPE_CHECKING:
    from edge_sdk.bundle.index import BundleIndex
    from export.bundles.quantized import Comparison

MODEL_HELP = (
    "Folder of a transformers model, its config.json for random weights, or MODULE:FUNCTION "
    "that returns a SplitModel."
)
TIERS_HELP = "TOML file with the tiers, see docs/export.md."


def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tiers: Annotated[Path, typer.Option(help=TIERS_HELP)],
    out: Annotated[Path, typer.Option(help="Folder to write the bundles to.")],
    sign: Annotated[
        Path | None, typer.Option(help="Private key to sign with, see cutlayer bundle key.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights to start from, .safetensors of a run.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz with x and y: graphs are verified on its rows, int8 is measured."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Largest loss of accuracy, or growth of perplexity, by int8 (0.01)."),
    ] = None,
    allow_loss: Annotated[
        bool, typer.Option(help="Export int8 even if it loses more than --max-loss.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    cache: Annotated[
        bool, typer.Option(help="Reuse what earlier exports have lowered and verified.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, progress to stderr.")
    ] = False,
) -> None:
    """Cut a model per tier and export its training steps, verified against PyTorch."""
    settings = TiersConfig.read(tiers)
    from edge_sdk.bundle.signing import read_private_key
    from edge_sdk.training.data import Examples
    from export.bundles.model_source import build_model
    from export.bundles.quantized import LossCheck
    from export.bundles.writer import export_bundles
    from export.lowering.export_cache import ExportCache
    from export.lowering.verification.verify import Report
    from export.out_folder import check_out
    from export.planning.planner import Planner

    check_out(out, overwrite)
    key = None if sign is None else read_private_key(sign)
    examples = None if data is None else Examples.from_npz(data)
    largest = 0.01 if max_loss is None else max_loss
    check = None if examples is None else LossCheck(examples, largest, allow_loss)
    if not any(tier.precision == "int8" for tier in settings.tiers.values()):
        for option, given in (("--max-loss", max_loss is not None), ("--allow-loss", allow_loss)):
            if given:
                raise ConfigError(
                    f'{option} has no effect: no tier in {tiers} has precision = "int8"; add it to '
                    f"a tier, or leave {option} out"
                )
    report = Report()
    comparisons: dict[str, Comparison] = {}
    console = Console(stderr=as_json, highlight=False, markup=False)
    with console.status("building the model") as status:
        lora = settings.make_lora()
        split = build_model(model, lora)
        if weights is not None:
            split.load(weights)
        example, classes = settings.example(split)

        def choose() -> dict[str, int]:
            def report(text: str, share: float | None) -> None:
                status.update(Text(f"looking for cuts: {text}"))

            with Planner(settings, split, example, classes, report) as planner:
                return planner.choose()

        chosen = settings.exported(split, choose)
        extra: dict[str, Any] = {} if lora is None else {"lora": vars(lora)}
        bases = None
        if settings.bases:
            status.update(f"splitting the model into {settings.bases} bases")
            for tier in chosen.values():
                if tier.cut != split.depth:
                    split.check_cut(tier.cut)
            extra["mix"] = settings.mix(example)
            bases = settings.make_bases(split, chosen, example, classes)
            split = bases.hub
        index = export_bundles(
            split,
            chosen,
            out,
            example=example,
            classes=classes,
            optimizer=settings.optimizer,
            decay=settings.decay,
            model_path=model,
            extra=extra,
            bases=bases,
            key=key,
            overwrite=overwrite,
            int8=check,
            compared=comparisons.__setitem__,
            data=examples,
            report=report,
            cache=ExportCache.of_user() if cache else None,
            progress=lambda line: status.update(Text(f"exporting {line}")),
        )
    if as_json:
        described = describe(index)
        for name, comparison in comparisons.items():
            described[name]["inference"] = comparison.to_json()
        print(json.dumps(described))
    else:
        console.print(table(index))
        console.print(str(report))
        if comparisons:
            console.print(inference_table(comparisons))
        console.print(f"written to {out}", soft_wrap=True)


def describe(index: BundleIndex) -> dict[str, dict[str, Any]]:
    """Cut, runtime, codec, number of parameters and sizes in bytes of each tier's bundle."""
    tiers = {}
    for name, entry in index.tiers.items():
        manifest = index.manifest(name)
        sizes = {"batch": 1, "seq": 1}
        tiers[name] = {
            "cut": entry.cut,
            "runtime": manifest.runtime,
            "codec": entry.codec,
            "parameters": sum(
                entry.spec.nbytes() // 4 for entry in manifest.state if entry.kind == "parameter"
            ),
            "bundle_bytes": sum(manifest.blobs.values()),
            "activation_bytes": sum(
                spec.nbytes(**sizes) for spec in manifest.packed if "batch" in spec.shape
            ),
            "manifest": entry.manifest,
        }
    return tiers


def table(index: BundleIndex) -> Table:
    """Table of the exported tiers."""
    result = Table(title="bundles, every graph equal to eager PyTorch")
    texts = any("seq" in spec.shape for n in index.tiers for spec in index.manifest(n).packed)
    unit = "token" if texts else "example"
    for column in ("tier", "cut", "runtime", "codec"):
        result.add_column(column, justify="right" if column == "cut" else "left")
    for column in ("trained parameters", "bundle MB", f"activations, bytes/{unit}"):
        result.add_column(column, justify="right")
    for name, d in describe(index).items():
        result.add_row(
            name,
            str(d["cut"]),
            str(d["runtime"]),
            str(d["codec"]),
            f"{d['parameters']:,}",
            f"{d['bundle_bytes'] / 1e6:.2f}",
            f"{d['activation_bytes']:,}",
        )
    return result


def inference_table(comparisons: Mapping[str, Comparison]) -> Table:
    """Table that compares int8 with float32: score, size and latency of each tier."""
    measure = next(iter(comparisons.values())).measure
    result = Table(title="inference in float32 and with int8 weights")
    result.add_column("tier")
    columns = [f"{what}, {p}" for what in (measure, "kB", "ms") for p in ("float32", "int8")]
    columns.insert(2, "loss")
    for column in columns:
        result.add_column(column, justify="right")
    score = "{:.1%}" if measure == "accuracy" else "{:.3f}"
    for name, c in comparisons.items():
        result.add_row(
            name,
            score.format(c.float32.score),
            score.format(c.int8.score),
            f"{c.loss:.2%}",
            f"{c.float32.kilobytes:,.0f}",
            f"{c.int8.kilobytes:,.0f}",
            f"{c.float32.milliseconds:.2f}",
            f"{c.int8.milliseconds:.2f}",
        )
    return result
