"""The demo with texts: SplitFT over devices whose cuts move, against one place that has it all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edge_sdk.errors import CutlayerError
from export.build import build_model
from export.lora import Lora
from export.optimizers import check_hyper
from export.writer import WEIGHTS, Tier, export_bundles
from server_hub.demo import texts
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
from server_hub.demo.texts import TOPICS, Pretraining, Shape, Texts
from server_hub.gateway.tokens import TokenFile
from server_hub.reports.report import write_report
from server_hub.reports.tables import markdown_table, move_lines
from server_hub.simulation.datasets import BYTES
from server_hub.storage.run_folder import RoundRecord, RunFolder

CUT_RANK = 8
LORA = Lora(rank=16, alpha=32, targets=["c_attn", "c_proj", "c_fc"])
CUTS = {"phone": 1, "tablet": 2, "laptop": 4}
"""Cut that a device of a tier has at first; it may go to any of the others."""

FLEET = {
    "phone-1": ("phone", 16),
    "phone-2": ("phone", 6),
    "tablet-1": ("tablet", 7),
    "tablet-2": ("tablet", 16),
    "laptop-1": ("laptop", 3),
    "laptop-2": ("laptop", 7),
}
"""Tier of each device, and how many times slower it is than a core of this machine.

Of two devices of a tier one is not what the tier says: that is what moves cuts.
"""

BATCH = 8
MERGED_ROWS = 16
SLOW_DEVICE = "server_hub.demo.slow_device"
PROMPT = "Return a copy of the "
PACKING = 0.02
"""What int8 activations may do to perplexity."""

HUB_TOML = """\
bundles = "{bundles}"
tokens = "{tokens}"
run = "{run}"
held_out = "{held_out}"

[listen]
port = 0

[method]
name = "splitft"
cut_rank = {cut_rank}

[rounds]
count = {rounds}
min_devices = {devices}

[local]
batch_size = {batch}
staleness = 1
hyper = {{ lr = {lr} }}

[cuts]
policy = "latency"

[trunk]
optimizer = "adamw"
max_rows = {max_rows}
hyper = {{ lr = {lr} }}
threads = 1
"""


@dataclass(frozen=True)
class TextDemo:
    """How large the demo is.

    Attributes:
        shape: of the model.
        pretraining: of the base.
        rounds: of fine-tuning.
        texts: of each device, at most.
        held_out: texts of each topic to measure on, at most.
        lr: learning rate of devices and trunk.
        lr_centralized: that of fine-tuning in one place.
        cuts: by tier.
        fleet: tier and slowness of each device; the first of them writes at the end.
    """

    shape: Shape = field(default_factory=Shape)
    pretraining: Pretraining = field(default_factory=Pretraining)
    rounds: int = 16
    texts: int = 96
    held_out: int = 24
    lr: float = 3e-3
    lr_centralized: float = 3e-3
    cuts: Mapping[str, int] = field(default_factory=lambda: CUTS)
    fleet: Mapping[str, tuple[str, float]] = field(default_factory=lambda: FLEET)


def run_text_demo(
    folder: Path,
    demo: TextDemo,
    console: Console,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
) -> dict[str, Any]:
    """Run the demo in ``folder``; returns what ``--json`` writes.

    Args:
        folder: a new one.
        demo: how large it is.
        console: where to show what happens.
        on_round: called after every round.

    Raises:
        CutlayerError: a process ended before its time; says which, and what it printed last.
    """
    started = time.monotonic()
    folder = folder.absolute()
    run_folder = RunFolder(folder, metric="perplexity")
    inputs = folder / "input"
    inputs.mkdir(parents=True)
    data = texts.load(TOPICS[: len(demo.fleet)], demo.shape.context, demo.texts, demo.held_out)
    console.print(
        f"[bold]1[/]  data: CPython's manual; {len(data.pretraining) / 1e3:.0f} kB on the language "
        f"to pretrain on,\n   and {len(data.shares)} topics on the library, one on each device: "
        f"{sum(map(len, data.shares.values()))} texts of up to {demo.shape.context} bytes, "
        f"{len(data.held_out)} more held out"
    )
    save_npz(inputs / "held_out.npz", data.held_out)

    base = folder / "base"
    _pretrain(base, demo, data, console)
    model = build_model(str(base), LORA)
    before = texts.perplexity(model, data.held_out)
    console.print(f"   perplexity of a byte, on the held-out texts: [bold]{before:.2f}[/]")

    console.print("[bold]3[/]  export: each tier's steps to ONNX, checked against PyTorch")
    with console.status("") as status:
        index = export_bundles(
            model,
            {
                name: Tier(cut=cut, returned=True, cut_rank=CUT_RANK)
                for name, cut in demo.cuts.items()
            },
            folder / "bundles",
            example=torch.from_numpy(data.held_out.x[:BATCH]),
            classes=BYTES,
            optimizer="adamw",
            model_path=str(base),
            extra={"lora": asdict(LORA)},
            progress=lambda line: status.update(line),
        )
    for name, entry in index.tiers.items():
        size = sum(index.manifest(name).blobs.values())
        console.print(f"   {name:7s} cut {entry.cut} of {model.depth}, bundle {size / 1e3:.0f} kB")

    console.print(
        f"[bold]4[/]  SplitFT: a hub and {len(demo.fleet)} devices, a process each, over websockets"
    )
    console.print(
        "   speeds are emulated, by sleeping; times slower than a core of this machine:\n   "
        + ", ".join(f"{name} {slower}" for name, (_, slower) in demo.fleet.items())
    )
    trained_at = time.monotonic()
    with ExitStack() as stack:
        devices, events, records = _federate(stack, folder, demo, data, console, on_round)
        training_seconds = time.monotonic() - trained_at
        reports = [device_report(d, folder, console) for d in devices]
        traffic = next(event["bytes"] for event in events if event["event"] == "done")
    tuned = build_model(str(base), LORA)
    tuned.load(folder / WEIGHTS)
    after = texts.perplexity(tuned, data.held_out)

    console.print("[bold]5[/]  the limit: the same adapters, trained on all texts in one place")
    whole = build_model(str(base), LORA)
    with console.status("training") as status:
        texts.fine_tune(
            whole,
            texts.pooled(data.shares.values()),
            demo.rounds,
            BATCH,
            check_hyper("adamw", {"lr": demo.lr_centralized}),
            progress=lambda n: status.update(f"epoch {n} of {demo.rounds}"),
        )
    result = {
        "ppl_before": before,
        "ppl_after": after,
        "ppl_centralized": texts.perplexity(whole, data.held_out),
        "through_hub": _through_hub(records[-1]),
        "cuts": [record.cuts for record in records],
        "moves": [{"round": r.round, **move} for r in records for move in r.moves],
        "writer": reports[0]["name"],
        "written": reports[0]["written"],
        "rounds": len(records),
        "bytes": traffic,
        "device_rss_mb": max(report["rss_mb"] for report in reports),
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    _check_saved_model(result)
    console.print(_perplexity_table(result))
    console.print(traffic_table(traffic))
    console.print(f"{result['writer']} and the hub together go on with {PROMPT!r}:")
    console.print(Text("   " + " ".join(result["written"].split()), style="italic"))
    console.print(
        f"{len(records)} rounds in {training_seconds:.0f} s, {len(result['moves'])} moves of cuts; "
        f"{result['seconds']:.0f} s in all; largest device process "
        f"{result['device_rss_mb']:.0f} MB, without torch"
    )
    run_folder.records.extend(records)
    _write_report(run_folder, result)
    console.print(f"report, pictures, metrics and model in {folder}")
    return result


def _pretrain(folder: Path, demo: TextDemo, data: Texts, console: Console) -> None:
    shape, plan = demo.shape, demo.pretraining
    console.print(
        f"[bold]2[/]  pretrain a GPT-2 of {shape.blocks} blocks, width {shape.width}, in one place"
    )
    bar = Progress(
        TextColumn("   steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=plan.steps, loss=0.0)
        texts.pretrain(
            folder, shape, data.pretraining, plan,
            progress=lambda step, loss: bar.update(task, completed=step, loss=loss),
        )  # fmt: skip


def _federate(
    stack: ExitStack,
    folder: Path,
    demo: TextDemo,
    data: Texts,
    console: Console,
    on_round: Callable[[RoundRecord], None],
) -> tuple[list[DeviceProcess], Iterator[dict[str, Any]], list[RoundRecord]]:
    """Start hub and devices, show the rounds as they come, until the last.

    Returns the devices, which are still writing; what the hub goes on to say; the rounds.
    """
    tokens = TokenFile(folder / "tokens.toml")
    secrets = {name: tokens.issue(name, tier) for name, (tier, _) in demo.fleet.items()}
    inputs = folder / "input"
    config = folder / "hub.toml"
    config.write_text(
        HUB_TOML.format(
            bundles=folder / "bundles",
            tokens=tokens.path,
            run=folder,
            held_out=inputs / "held_out.npz",
            cut_rank=CUT_RANK,
            rounds=demo.rounds,
            devices=len(demo.fleet),
            batch=BATCH,
            max_rows=MERGED_ROWS,
            lr=demo.lr,
        )
    )
    hub = stack.enter_context(
        module_process(folder, "hub", CUTLAYER, "hub", "--config", str(config), "--json")
    )
    events = hub_events(hub, folder)
    address = next(event["address"] for event in events if event["event"] == "ready")
    devices: list[DeviceProcess] = []
    for (name, (tier, slower)), share in zip(demo.fleet.items(), data.shares.values(), strict=True):
        save_npz(inputs / f"{name}.npz", share)
        arguments = [
            "--url", address, "--data", str(inputs / f"{name}.npz"),
            "--cache", str(folder / "cache" / name), "--slower", str(slower),
        ]  # fmt: skip
        if not devices:
            arguments += ["--prompt", PROMPT, "--context", str(demo.shape.context)]
        process = module_process(folder, name, SLOW_DEVICE, *arguments, token=secrets[name])
        devices.append(DeviceProcess(name, tier, stack.enter_context(process)))
    table = partial(_rounds_table, demo)
    return devices, events, watch(events, folder, demo.rounds, console, on_round, table)


def _through_hub(record: RoundRecord) -> dict[str, float]:
    """Perplexity by tier, of a device's half and the hub's together."""
    return {tier: paths["through_hub"] for tier, paths in record.accuracy.items()}


def _rounds_table(demo: TextDemo, records: Sequence[RoundRecord]) -> RenderableType:
    """The last rounds, and all moves so far."""
    table = Table(box=None, padding=(0, 1))
    fleets = [[n for n, (of, _) in demo.fleet.items() if of == tier] for tier in demo.cuts]
    cuts = [f"cuts of\n{tier}s" for tier in demo.cuts]
    for column in ("round", "s", "loss", "perplexity", "MB up", "MB down", *cuts):
        table.add_column(column, justify="right")
    for r in records[-8:]:
        table.add_row(
            str(r.round),
            f"{r.seconds:.1f}",
            "" if r.trunk_loss is None else f"{r.trunk_loss:.3f}",
            f"{fmean(_through_hub(r).values()):.3f}",
            f"{r.up / 1e6:.1f}",
            f"{r.down / 1e6:.1f}",
            *(" ".join(str(r.cuts.get(name, "-")) for name in names) for names in fleets),
        )
    lines = [f"after round {r.round} {line}" for r in records for line in move_lines(r)]
    return Group(table, *(Padding(line, (0, 0, 0, 3)) for line in lines))


def _check_saved_model(result: dict[str, Any]) -> None:
    """The saved model must be what answered through the hub, but for packing at the cut."""
    for tier, value in result["through_hub"].items():
        if abs(value / result["ppl_after"] - 1) > PACKING:
            raise CutlayerError(
                f"the saved model has a perplexity of {result['ppl_after']:.2f}, the path through "
                f"the hub from tier {tier} {value:.2f}; they must agree"
            )


def _perplexity_rows(result: dict[str, Any]) -> list[list[str]]:
    tuned = [f"{value:.2f}" for value in result["through_hub"].values()]
    none = ["" for _ in tuned]
    return [
        ["as pretrained", f"{result['ppl_before']:.2f}", *none],
        ["SplitFT over the devices", f"{result['ppl_after']:.2f}", *tuned],
        ["all texts in one place", f"{result['ppl_centralized']:.2f}", *none],
    ]


def _perplexity_header(result: dict[str, Any]) -> list[str]:
    return ["model", "uncut", *(f"{tier}, through hub" for tier in result["through_hub"])]


def _perplexity_table(result: dict[str, Any]) -> Table:
    table = Table(title="perplexity of a byte on held-out texts")
    for number, column in enumerate(_perplexity_header(result)):
        table.add_column(column, justify="right" if number else "left")
    for row in _perplexity_rows(result):
        table.add_row(*row)
    return table


def _write_report(run: RunFolder, result: dict[str, Any]) -> None:
    write_report(
        run,
        "SplitFT over devices of unequal speed, on CPython's manual",
        [
            "## Perplexity of a byte on held-out texts\n\n"
            + markdown_table(_perplexity_header(result), _perplexity_rows(result)),
            "*All texts in one place*: the same adapters at full rank, by eager PyTorch on as "
            "many samples; no device could do that.\n\n"
            f"{result['rounds']} rounds in {result['training_seconds']:.0f} s.",
            f"{result['writer']} and the hub go on with a text:\n\n```\n{result['written']}\n```",
        ],
        reference=("all texts in one place", result["ppl_centralized"]),
    )
