"""``cutlayer bundle``: keys, signatures, and what is in the bundles of a folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from edge_sdk.bundle import signing
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Graph, Manifest, Port
from edge_sdk.errors import BundleError
from edge_sdk.protocol.tensors import TensorSpec
from edge_sdk.runtime.measure import STEPS, measure_apart

bundle = typer.Typer(
    help="Look into bundles, check, sign and measure them; make keys for it.", no_args_is_help=True
)

FolderArgument = Annotated[Path, typer.Argument(help="Folder written by cutlayer export.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

console = Console(highlight=False, markup=False)


@bundle.command()
def key(
    path: Annotated[Path, typer.Argument(help="File of the private key; PATH.pub is the other.")],
) -> None:
    """Make a key pair to sign bundles with, and print the public key.

    PATH, the private key, stays with whoever exports. PATH.pub goes to the devices.
    """
    print(signing.new_key(path))


@bundle.command()
def sign(
    folder: FolderArgument,
    key_file: Annotated[Path, typer.Option("--key", help="Private key, by cutlayer bundle key.")],
) -> None:
    """Sign the bundles of all tiers, in place of earlier signatures."""
    private = signing.read_private_key(key_file)
    index = signing.sign_folder(folder, private)
    table = Table("tier", "identity", "signed by")
    for tier, entry in index.tiers.items():
        table.add_row(tier, f"{entry.manifest[:12]}…", _signer(signing.public_key(private)))
    console.print(table)


@bundle.command()
def verify(
    folder: FolderArgument,
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Public key, or .pub file, that must have signed; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every file of every bundle; exit code 1 if one is missing, changed or wrongly signed."""
    trusted = signing.read_trust(trust or None)
    reports = signing.verify_folder(BundleIndex.read(folder), trusted)
    if as_json:
        print(json.dumps({tier: dataclasses.asdict(report) for tier, report in reports.items()}))
    else:
        table = Table("tier", "identity", "blobs", "size", "signed by", "")
        for tier, report in reports.items():
            table.add_row(
                tier,
                f"{report.manifest[:12]}…",
                str(report.blobs),
                decimal(report.size),
                "" if report.faults else _signer(report.signer),
                "faulty" if report.faults else "intact",
            )
        console.print(table)
        for tier, report in reports.items():
            for fault in report.faults:
                console.print(f"{tier}: {fault}", soft_wrap=True)
    if any(report.faults for report in reports.values()):
        raise typer.Exit(1)


@bundle.command()
def show(
    folder: FolderArgument,
    tier: Annotated[str | None, typer.Argument(help="Only this tier.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is in the bundles: graphs with inputs and outputs, files, who signed them."""
    index = BundleIndex.read(folder)
    if tier is not None and tier not in index.tiers:
        raise BundleError(f"{folder} has no tier {tier!r}; it has {', '.join(index.tiers)}")
    manifests = {name: index.manifest(name) for name in index.tiers}
    shown = [name for name in index.tiers if tier in (None, name)]
    described = {name: _describe(name, index, manifests) for name in shown}
    if as_json:
        print(json.dumps({"model": index.model, "tiers": described}))
        return
    for name in shown:
        manifest, facts = manifests[name], described[name]
        console.print(
            f"{name}: {facts['identity'][:12]}…, signed by {_signer(facts['signer'])}",
            style="bold",
            soft_wrap=True,
        )
        console.print(
            f"cut {manifest.cut}, {manifest.runtime}, {manifest.codec} activations, "
            f"{manifest.optimizer}, {manifest.classes} {manifest.task}, "
            f"{facts['parameters']:,} parameters, {facts['frozen']:,} frozen, "
            f"heads {', '.join(manifest.heads)}"
            + "".join(f", {name} ≤ {size}" for name, size in manifest.limits.items()),
            soft_wrap=True,
        )
        console.print(_graph_table(manifest.graphs))
        console.print(_blob_table(facts["blobs"]))


@bundle.command()
def measure(
    folder: FolderArgument,
    tier: Annotated[str, typer.Argument(help="Which tier's bundle.")],
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of a step; the bundle's limit, else 32.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = STEPS,
    threads: Annotated[int, typer.Option(min=1, help="Threads within one operator.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a text; 64, or the bundle's limit if less."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run training steps on random examples, and say what memory and time they take here.

    A step runs the graphs that the bundle was exported for: activate and backward where gradients
    are returned, attack and adversarial_train for adversarial examples, else train.
    """
    index = BundleIndex.read(folder)
    if tier not in index.tiers:
        raise BundleError(f"{folder} has no tier {tier!r}; it has {', '.join(index.tiers)}")
    found = measure_apart(folder, tier, batch, length, steps, threads)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    console.print(f"a training step of {tier}: {found.step_s:.4g} s (median of {steps})")
    console.print(
        f"memory: {decimal(found.memory_bytes)} for the bundle and its steps, "
        f"{decimal(found.process_bytes)} for the whole process, at the peak",
        soft_wrap=True,
    )


def _describe(tier: str, index: BundleIndex, manifests: dict[str, Manifest]) -> dict[str, Any]:
    """What is in a tier's bundle, as JSON has it."""
    identity, manifest = index.tiers[tier].manifest, manifests[tier]
    return {
        "identity": identity,
        "signer": signing.check(index.blobs().read(identity)),
        "cut": manifest.cut,
        "runtime": manifest.runtime,
        "codec": manifest.codec,
        "optimizer": manifest.optimizer,
        "task": manifest.task,
        "classes": manifest.classes,
        "limits": manifest.limits,
        "heads": manifest.heads,
        "parameters": sum(_elements(e.spec) for e in manifest.state if e.kind == "parameter"),
        "frozen": sum(_elements(spec) for c in manifest.constants for spec in c.tensors),
        "graphs": {name: dataclasses.asdict(graph) for name, graph in manifest.graphs.items()},
        "blobs": _blobs(tier, manifests),
    }


def _signer(key: str | None) -> str:
    return "nobody" if key is None else signing.shortened(key)


def _elements(spec: TensorSpec) -> int:
    """Number of values in a tensor of the state or a frozen one: no dimension is symbolic."""
    return math.prod(int(n) for n in spec.shape)


def _blobs(tier: str, manifests: dict[str, Manifest]) -> dict[str, dict[str, Any]]:
    """Size of each of a tier's blobs, what it is for, and which other tiers have it, too."""
    manifest = manifests[tier]
    holds: dict[str, list[str]] = {blob: [] for blob in manifest.blobs}
    holds[manifest.initial_state].append("initial state")
    for name, graph in manifest.graphs.items():
        holds[graph.blob].append(f"graph {name}")
    for constants in manifest.constants:
        holds[constants.blob].append("frozen tensors")
    return {
        blob: {
            "size": size,
            "holds": holds[blob],
            "shared_with": [t for t, m in manifests.items() if t != tier and blob in m.blobs],
        }
        for blob, size in manifest.blobs.items()
    }


def _blob_table(blobs: dict[str, dict[str, Any]]) -> Table:
    table = Table("blob", "holds", "size", "shared with")
    for name, blob in blobs.items():
        table.add_row(
            f"{name[:12]}…",
            ", ".join(blob["holds"]),
            decimal(blob["size"]),
            ", ".join(blob["shared_with"]),
        )
    return table


def _graph_table(graphs: dict[str, Graph]) -> Table:
    """Inputs and outputs of the graphs; the tensors of the state, which are many, in one line."""
    table = Table("graph", "", "name", "dtype", "shape", "role")
    for name, graph in graphs.items():
        for direction, ports in (("in", graph.inputs), ("out", graph.outputs)):
            for row in _rows(ports):
                table.add_row(name, direction, *row)
                name = direction = ""
        table.add_section()
    return table


def _rows(ports: Sequence[Port]) -> list[tuple[str, str, str, str]]:
    state = [port.spec for port in ports if port.role == "state"]
    rows = [
        (
            port.spec.name,
            port.spec.dtype,
            " × ".join(map(str, port.spec.shape)) or "scalar",
            port.role,
        )
        for port in ports
        if port.role != "state"
    ]
    if state:
        dtypes = ", ".join(sorted({spec.dtype for spec in state}))
        values = f"{sum(map(_elements, state)):,} values"
        rows.insert(0, (f"{len(state)} tensors", dtypes, values, "state"))
    return rows
