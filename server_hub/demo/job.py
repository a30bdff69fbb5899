"""The demo's job: export, hub and devices as processes, the same without a hub, and the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import CutlayerError
from edge_sdk.training.data import Examples
from export.writer import WEIGHTS, Tier, export_bundles
from server_hub.demo import digits
from server_hub.demo.no_hub import federated_averaging
from server_hub.demo.processes import (
    CUTLAYER,
    DeviceProcess,
    device_report,
    hub_events,
    module_process,
    save_npz,
    traffic_table,
    watch,
)
from server_hub.gateway.tokens import TokenFile
from server_hub.reports.report import write_report
from server_hub.reports.tables import PATHS, markdown_table
from server_hub.storage.run_folder import RoundRecord, RunFolder

TIERS = {"small": Tier(cut=1), "medium": Tier(cut=3), "large": Tier(cut=5)}
DEVICES_PER_TIER = 2
ALPHA = 1.0
"""Dirichlet parameter of the partition: devices have unequal amounts and mixes of classes."""

HYPER = {"lr": 0.03}
BATCH = 16
MERGED_ROWS = 64
HUB_TOML = """\
bundles = "{bundles}"
tokens = "{tokens}"
run = "{run}"
held_out = "{held_out}"

[listen]
port = 0

[rounds]
count = {rounds}
min_devices = {devices}

[local]
batch_size = {batch}
hyper = {{ lr = {lr} }}

[trunk]
max_rows = {max_rows}
hyper = {{ lr = {lr} }}
threads = 1
"""


def run_demo(
    folder: Path,
    rounds: int,
    console: Console,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
) -> dict[str, Any]:
    """Run the demo in ``folder``; returns what ``--json`` writes.

    Args:
        folder: a new one.
        rounds: of federated training.
        console: where to show what happens.
        on_round: called after every round.

    Raises:
        CutlayerError: a process ended before its time; says which, and what it printed last.
    """
    started = time.monotonic()
    folder = folder.absolute()
    run_folder = RunFolder(folder)
    train, held_out = digits.load()
    console.print(
        f"[bold]1[/]  data: {len(train)} digits on {DEVICES_PER_TIER * len(TIERS)} devices, "
        f"{len(held_out)} held out"
    )
    shares = digits.partition(train, DEVICES_PER_TIER * len(TIERS), ALPHA)
    inputs = folder / "input"
    inputs.mkdir(parents=True)
    save_npz(inputs / "held_out.npz", held_out)

    console.print("[bold]2[/]  export: each tier's training steps to ONNX, checked against PyTorch")
    model = digits.build_for_demo()
    with console.status("") as status:
        index = export_bundles(
            model,
            TIERS,
            folder / "bundles",
            example=torch.from_numpy(train.x[:64]),
            classes=digits.CLASSES,
            model_path=digits.MODEL,
            progress=lambda line: status.update(line),
        )
    for name, entry in index.tiers.items():
        size = sum(index.manifest(name).blobs.values())
        console.print(f"   {name:7s} cut {entry.cut} of {model.depth}, bundle {size / 1e3:.0f} kB")

    console.print("[bold]3[/]  train: a hub and six devices, a process each, over websockets")
    trained_at = time.monotonic()
    with ExitStack() as stack:
        devices, events, records = _federate(
            stack, folder, inputs, shares, rounds, console, on_round
        )
        training_seconds = time.monotonic() - trained_at
        reports = [device_report(device, folder, console) for device in devices]
        traffic = next(event["bytes"] for event in events if event["event"] == "done")

    console.print("[bold]4[/]  the same devices without a hub: the model of the poorest, FedAvg")
    with console.status("training") as status:
        no_hub = federated_averaging(
            model,
            index,
            min(TIERS, key=lambda name: TIERS[name].cut),
            shares,
            held_out,
            rounds,
            HYPER,
            BATCH,
            progress=lambda n: status.update(f"round {n} of {rounds}"),
        )
    result = _result(index, reports, records, traffic, no_hub, training_seconds, started)
    _check_saved_model(folder, result, held_out)
    console.print(accuracy_table(result))
    console.print(traffic_table(traffic))
    rate = 60 * len(records) / sum(r.seconds for r in records)
    console.print(
        f"{len(records)} rounds, {rate:.0f} rounds a minute, {result['seconds']:.0f} s in all; "
        f"largest device process {result['device_rss_mb']:.0f} MB, without torch"
    )
    run_folder.records.extend(records)
    _write_report(run_folder, result)
    console.print(f"report, curves, metrics and model in {folder}")
    return result


def _federate(
    stack: ExitStack,
    folder: Path,
    inputs: Path,
    shares: Sequence[Examples],
    rounds: int,
    console: Console,
    on_round: Callable[[RoundRecord], None],
) -> tuple[list[DeviceProcess], Iterator[dict[str, Any]], list[RoundRecord]]:
    """Start hub and devices, show the rounds as they come, until the last.

    Returns the devices, which are still measuring; what the hub goes on to say; the rounds.
    """
    tokens = TokenFile(folder / "tokens.toml")
    tiers = [tier for tier in TIERS for _ in range(DEVICES_PER_TIER)]
    names = [f"{tier}-{i % DEVICES_PER_TIER + 1}" for i, tier in enumerate(tiers)]
    secrets = {name: tokens.issue(name, tier) for name, tier in zip(names, tiers, strict=True)}
    (folder / "hub.toml").write_text(
        HUB_TOML.format(
            bundles=folder / "bundles",
            tokens=tokens.path,
            run=folder,
            held_out=inputs / "held_out.npz",
            rounds=rounds,
            devices=len(names),
            batch=BATCH,
            max_rows=MERGED_ROWS,
            lr=HYPER["lr"],
        )
    )
    config = str(folder / "hub.toml")
    hub = stack.enter_context(
        module_process(folder, "hub", CUTLAYER, "hub", "--config", config, "--json")
    )
    events = hub_events(hub, folder)
    address = next(event["address"] for event in events if event["event"] == "ready")
    devices = []
    for name, tier, share in zip(names, tiers, shares, strict=True):
        save_npz(inputs / f"{name}.npz", share)
        arguments = [
            "device", "--url", address, "--data", str(inputs / f"{name}.npz"),
            "--evaluate", str(inputs / "held_out.npz"),
            "--cache", str(folder / "cache" / name), "--json",
        ]  # fmt: skip
        process = module_process(folder, name, CUTLAYER, *arguments, token=secrets[name])
        devices.append(DeviceProcess(name, tier, stack.enter_context(process)))
    return devices, events, watch(events, folder, rounds, console, on_round, _rounds_table)


def _result(
    index: BundleIndex,
    reports: Sequence[dict[str, Any]],
    records: Sequence[RoundRecord],
    traffic: dict[str, dict[str, int]],
    no_hub: float,
    training_seconds: float,
    started: float,
) -> dict[str, Any]:
    tiers = {}
    for name, entry in index.tiers.items():
        mine = [r["evaluation"] for r in reports if r["tier"] == name]
        tiers[name] = {"cut": entry.cut} | {
            path: float(np.mean([evaluation[path] for evaluation in mine])) for path in PATHS
        }
    return {
        "tiers": tiers,
        "no_hub": no_hub,
        "rounds": len(records),
        "seconds": round(time.monotonic() - started, 1),
        "training_seconds": round(training_seconds, 1),
        "bytes": traffic,
        "device_rss_mb": max(r["rss_mb"] for r in reports),
    }


def _check_saved_model(folder: Path, result: dict[str, Any], held_out: Examples) -> None:
    """Load the trained model into a fresh PyTorch model and measure it: nothing may be lost.

    The paths through the hub quantise the activations at the cut, so that they may differ from
    the uncut model by a few examples.
    """
    model = digits.build_for_demo()
    model.load(folder / WEIGHTS)
    with torch.no_grad():
        answers = model.eval()(torch.from_numpy(held_out.x)).argmax(1).numpy()
    result["saved_model"] = float((answers == held_out.y).mean())
    for name, tier in result["tiers"].items():
        if abs(tier["through_hub"] - result["saved_model"]) > 0.02:
            raise CutlayerError(
                f"the saved model has an accuracy of {result['saved_model']:.1%}, the path "
                f"through the hub from tier {name} {tier['through_hub']:.1%}; they must agree"
            )


def _rounds_table(records: Sequence[RoundRecord]) -> Table:
    """The last rounds; accuracy by tier in percent is device alone, then ensemble."""
    table = Table(box=None, padding=(0, 1))
    tiers = [f"{tier}, %\nalone | all" for tier in TIERS]
    for column in ("round", "s", "loss", "trunk loss", *tiers, "MB up", "MB down"):
        table.add_column(column, justify="right")
    for r in records[-6:]:
        up, down = (sum(kind[way] for kind in r.bytes.values()) for way in ("up", "down"))
        table.add_row(
            str(r.round),
            f"{r.seconds:.1f}",
            *("" if loss is None else f"{loss:.3f}" for loss in (r.local_loss, r.trunk_loss)),
            *(
                f"{100 * r.accuracy[tier]['device_alone']:.0f} | "
                f"{100 * r.accuracy[tier]['ensemble']:.0f}"
                for tier in TIERS
            ),
            f"{up / 1e6:.1f}",
            f"{down / 1e6:.1f}",
        )
    return table


def accuracy_table(result: dict[str, Any]) -> Table:
    """Accuracy by tier and path, and without a hub."""
    table = Table(title="accuracy on held-out digits")
    for column in ("tier", "cut", *PATHS.values(), "without a hub"):
        table.add_column(column, justify="left" if column == "tier" else "right")
    for row in _accuracy_rows(result):
        table.add_row(*row)
    return table


def _accuracy_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            str(tier["cut"]),
            *(f"{tier[path]:.1%}" for path in PATHS),
            f"{result['no_hub']:.1%}",
        ]
        for name, tier in result["tiers"].items()
    ]


def _write_report(run: RunFolder, result: dict[str, Any]) -> None:
    header = ["tier", "cut", *PATHS.values(), "without a hub"]
    write_report(
        run,
        "FedSplitX over six devices of three tiers, on digits",
        [
            "## Accuracy on held-out digits\n\n" + markdown_table(header, _accuracy_rows(result)),
            "*Without a hub*: the model that fits the poorest tier, trained by federated "
            "averaging on the same devices for the same rounds.\n\n"
            f"{result['rounds']} rounds in {result['training_seconds']:.0f} s. "
            f"Largest device process: {result['device_rss_mb']:.0f} MB. "
            f"The saved model, uncut, in PyTorch: {result['saved_model']:.1%}.",
        ],
        reference=("without a hub", result["no_hub"]),
    )
