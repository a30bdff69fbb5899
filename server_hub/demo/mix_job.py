"""The demo with mixtures: Split-Mix over six devices, then one device that mixes what it likes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import CutlayerError
from edge_sdk.training.adversarial import Attack
from edge_sdk.training.data import Examples
from export.bases import split_width
from export.build import draw_inputs, model_of
from export.split import SplitModel
from export.whole import whole_bases
from export.writer import Tier, export_bundles
from server_hub.demo import digits
from server_hub.demo.mix_model import BASES, MODEL, build
from server_hub.demo.processes import (
    CUTLAYER,
    DeviceProcess,
    device_report,
    hub_events,
    module_process,
    save_npz,
    tail,
    traffic_table,
    watch,
)
from server_hub.gateway.tokens import TokenFile
from server_hub.reports.report import write_report
from server_hub.reports.tables import markdown_table
from server_hub.storage.run_folder import RoundRecord, RunFolder
from server_hub.trunk.adversarial import hard_examples

MIX_DEVICE = "server_hub.demo.mix_device"
ATTACK = Attack(epsilon=0.1, step_size=0.025, steps=7)
"""Pixels are from 0 to 1."""

MIXED = (1, 2, 4, 8)
ROBUSTNESS = (0.0, 0.5, 1.0)
BATCH = 16
BUDGETS = {"small": 1 / 8, "medium": 1 / 4, "large": 1 / 2}
"""Part of the wide model that a device of a tier trains in a round."""

HARDENING = ("medium", "large")
"""Tiers whose devices make examples hard; small ones train on theirs as they are."""

DEVICES_PER_TIER = 2

HUB_TOML = """\
bundles = "{bundles}"
tokens = "{tokens}"
run = "{run}"
held_out = "{held_out}"
keep_serving = true

[listen]
port = 0

[method]
name = "splitmix"

[rounds]
count = {rounds}
min_devices = {devices}

[local]
batch_size = {batch}
hyper = {{ lr = {lr}, momentum = 0.9 }}

[mix]
robustness = 0.5
attack = {{ epsilon = {epsilon}, step_size = {step_size}, steps = {steps} }}
budgets = {{ {budgets} }}
"""


@dataclass(frozen=True)
class MixtureDemo:
    """How large the demo is.

    Attributes:
        rounds: of federated training.
        lr: learning rate of the devices.
        mixed: how many bases the device mixes, one after the other.
    """

    rounds: int = 40
    lr: float = 0.1
    mixed: Sequence[int] = field(default=MIXED)


def run_mix_demo(
    folder: Path,
    demo: MixtureDemo,
    console: Console,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
) -> dict[str, Any]:
    """Run the demo in ``folder``; returns what ``--json`` writes.

    Args:
        folder: a new one.
        demo: how large.
        console: where to show what happens.
        on_round: called after every round.

    Raises:
        CutlayerError: a process ended before its time; says which, and what it printed last.
    """
    started = time.monotonic()
    folder = folder.absolute()
    run_folder = RunFolder(folder)
    train, held_out = digits.load()
    count = DEVICES_PER_TIER * len(BUDGETS)
    console.print(
        f"[bold]1[/]  data: {len(train)} digits on {count} devices, {len(held_out)} held out"
    )
    inputs = folder / "input"
    inputs.mkdir(parents=True)
    save_npz(inputs / "held_out.npz", held_out)
    console.print(
        f"[bold]2[/]  export: the model split by width into {BASES} bases with dual norms, their "
        "steps to ONNX, checked against PyTorch"
    )
    index = _export(folder, train, console)
    console.print(f"[bold]3[/]  train: a hub and {count} devices, a process each, over websockets")
    with ExitStack() as stack:
        address, secret, records, traffic = _federate(
            stack, folder, inputs, train, demo, console, on_round
        )
        console.print("[bold]4[/]  examples made hard for every mixture, by one who knows it")
        with console.status(""):
            _make_hard(folder, index, records[-1].order, held_out, demo)
        console.print("[bold]5[/]  one device mixes, without another download than of bases")
        rows, choices = _ask(stack, folder, address, secret, demo, console)
    for name, choice in choices.items():
        bases = f"[bold]{choice['bases']}[/] {'base' if choice['bases'] == 1 else 'bases'}"
        console.print(
            f"   {name}: {bases}, robustness [bold]{choice['robustness']:g}[/]. {choice['reason']}"
        )
    console.print(traffic_table(traffic))
    result = {
        "rows": rows,
        "choices": choices,
        "rounds": len(records),
        "bytes": traffic,
        "seconds": round(time.monotonic() - started, 1),
    }
    run_folder.records.extend(records)
    _write_report(run_folder, result)
    console.print(
        f"{result['seconds']:.0f} s in all; report, curves, metrics and bases in {folder}"
    )
    return result


def _export(folder: Path, train: Examples, console: Console) -> BundleIndex:
    model, example = build(), torch.from_numpy(train.x[:64])
    depth = model.depth
    like = {"bases": BASES, "dual_norms": True, "shape": list(train.x.shape[1:]), "high": None}
    bases = split_width(model, BASES, draw_inputs(train.x.shape[1:], None)).with_dual_norms()
    found = whole_bases(bases, [], example, digits.CLASSES)
    tiers = {
        name: Tier(depth, batch=BATCH, bases=BASES, adversarial=name in HARDENING)
        for name in BUDGETS
    }
    with console.status("") as status:
        index = export_bundles(
            found.hub,
            tiers,
            folder / "bundles",
            example=example,
            classes=digits.CLASSES,
            model_path=MODEL,
            extra={"mix": like},
            bases=found,
            progress=lambda line: status.update(line),
        )
    wide = sum(p.numel() for p in model.parameters())
    base = sum(p.numel() for p in bases.model.parameters())
    console.print(
        f"   {wide:,} parameters in the wide model, {base:,} in a base, "
        f"{BASES * base / wide:.1%} of the wide model in all {BASES}"
    )
    return index


def _federate(
    stack: ExitStack,
    folder: Path,
    inputs: Path,
    train: Examples,
    demo: MixtureDemo,
    console: Console,
    on_round: Callable[[RoundRecord], None],
) -> tuple[str, str, list[RoundRecord], dict[str, dict[str, int]]]:
    """Run the rounds, until every device has left; the hub goes on to serve.

    Returns its address, the token of a further device, the rounds, and the traffic.
    """
    tokens = TokenFile(folder / "tokens.toml")
    names = [f"{tier}-{i + 1}" for tier in BUDGETS for i in range(DEVICES_PER_TIER)]
    secrets = {name: tokens.issue(name, name.partition("-")[0]) for name in names}
    guest = tokens.issue("guest", "large")
    config = folder / "hub.toml"
    config.write_text(
        HUB_TOML.format(
            bundles=folder / "bundles",
            tokens=tokens.path,
            run=folder,
            held_out=inputs / "held_out.npz",
            rounds=demo.rounds,
            devices=len(names),
            batch=BATCH,
            lr=demo.lr,
            budgets=", ".join(f"{tier} = {budget}" for tier, budget in BUDGETS.items()),
            epsilon=ATTACK.epsilon,
            step_size=ATTACK.step_size,
            steps=ATTACK.steps,
        )
    )
    hub = stack.enter_context(
        module_process(folder, "hub", CUTLAYER, "hub", "--config", str(config), "--json")
    )
    stack.callback(hub.terminate)  # it serves until it is told to stop
    events = hub_events(hub, folder)
    address = next(event["address"] for event in events if event["event"] == "ready")
    devices = []
    shares = digits.partition(train, len(names), 1.0)
    for name, share in zip(names, shares, strict=True):
        save_npz(inputs / f"{name}.npz", share)
        arguments = [
            "device", "--url", address, "--data", str(inputs / f"{name}.npz"),
            "--cache", str(folder / "cache" / name), "--json",
        ]  # fmt: skip
        process = module_process(folder, name, CUTLAYER, *arguments, token=secrets[name])
        tier = name.partition("-")[0]
        devices.append(DeviceProcess(name, tier, stack.enter_context(process)))
    records = watch(events, folder, demo.rounds, console, on_round, _rounds_table)
    for device in devices:
        device_report(device, folder, console)
    return address, guest, records, records[-1].bytes


def _rounds_table(records: Sequence[RoundRecord]) -> Table:
    """The last rounds; accuracy in percent of the best so many bases, mixed."""
    table = Table(box=None, padding=(0, 1))
    mixed = [f"{n} {'base' if n == 1 else 'bases'}, %" for n in MIXED]
    for column in ("round", "s", "loss", *mixed, "MB up", "MB down"):
        table.add_column(column, justify="right")
    for r in records[-6:]:
        table.add_row(
            str(r.round),
            f"{r.seconds:.1f}",
            "" if r.local_loss is None else f"{r.local_loss:.3f}",
            *(f"{100 * r.mixed[str(n)]:.1f}" for n in MIXED),
            f"{r.up / 1e6:.1f}",
            f"{r.down / 1e6:.1f}",
        )
    return table


def _make_hard(
    folder: Path, index: BundleIndex, order: Sequence[int], held_out: Examples, demo: MixtureDemo
) -> None:
    """Write the held-out examples as they are, and made hard for each mixture."""
    bases = [_saved_base(folder, index, base) for base in order]
    x, y = torch.from_numpy(held_out.x), torch.from_numpy(held_out.y)
    hard: dict[str, Any] = {
        f"{n}/{robust:g}": hard_examples(bases[:n], x, y, ATTACK, robust).numpy()
        for n in demo.mixed
        for robust in ROBUSTNESS
    }
    np.savez(folder / "input" / "hard.npz", **hard, x=held_out.x, y=held_out.y)


def _saved_base(folder: Path, index: BundleIndex, base: int) -> SplitModel:
    model = model_of(index.model, index.extra, None)
    model.load(folder / f"model.base-{base}.safetensors")
    return model.eval()


def _ask(
    stack: ExitStack, folder: Path, address: str, token: str, demo: MixtureDemo, console: Console
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Show what one device answers in every manner; returns the rows, and what a policy picks."""
    arguments = [
        "--url", address, "--cache", str(folder / "cache" / "guest"),
        "--hard", str(folder / "input" / "hard.npz"),
        "--bases", *map(str, demo.mixed), "--robustness", *(f"{r:g}" for r in ROBUSTNESS),
    ]  # fmt: skip
    process = stack.enter_context(
        module_process(folder, "guest", MIX_DEVICE, *arguments, token=token)
    )
    assert process.stdout is not None
    rows: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    with Live(mix_table(rows), console=console) as live:
        for line in process.stdout:
            last = json.loads(line)
            if "bases" in last:
                rows.append(last)
                live.update(mix_table(rows))
    if not console.is_terminal:
        console.line()  # there, what is live ends without one
    if process.wait() != 0:
        raise CutlayerError(f"the device that mixes failed:\n{tail(folder, 'guest')}")
    if last["torch_imported"]:
        raise CutlayerError("the device that mixes imported torch; a device must not need it")
    return rows, last["choices"]


_COLUMNS = {
    "bases": "bases",
    "lambda": "λ",
    "clean_accuracy": "clean",
    "robust_accuracy": "made hard",
    "latency_ms": "ms",
    "rss_mb": "process, MB",
}


def mix_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy, time and memory of each mixture on one device."""
    table = Table(title="one device, switched live: accuracy on held-out digits")
    for column in _COLUMNS.values():
        table.add_column(column, justify="right")
    for row in _rows(rows):
        table.add_row(*row, end_section=row[1] == f"{ROBUSTNESS[-1]:g}")
    return table


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            str(row["bases"]),
            f"{row['lambda']:g}",
            f"{row['clean_accuracy']:.1%}",
            f"{row['robust_accuracy']:.1%}",
            f"{row['latency_ms']:.2f}",
            f"{row['rss_mb']:.1f}",
        ]
        for row in rows
    ]


def _write_report(run: RunFolder, result: Mapping[str, Any]) -> None:
    said = [
        f"- {name}: {c['bases']} bases, robustness {c['robustness']:g}. {c['reason']}"
        for name, c in result["choices"].items()
    ]
    table = markdown_table(list(_COLUMNS.values()), _rows(result["rows"]))
    write_report(
        run,
        "Split-Mix over six devices of three tiers, on digits",
        [
            f"## One device, mixing\n\n{table}",
            f"*Made hard*: no pixel, from 0 to 1, is farther than {ATTACK.epsilon:g} from where it "
            "was; by projected gradient ascent against the very mixture.",
            "## What a policy picks\n\n" + "\n".join(said),
        ],
    )
