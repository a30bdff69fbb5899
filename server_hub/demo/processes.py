"""What the demos share: a hub and its devices as processes, what they print, traffic as a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_sdk.errors import CutlayerError
from edge_sdk.training.data import Examples
from server_hub.reports.tables import megabytes
from server_hub.storage.run_folder import RoundRecord

CUTLAYER = "edge_sdk.cli.main"
"""Module of the ``cutlayer`` command."""


@dataclass
class DeviceProcess:
    """A device of a demo: its name, tier and process."""

    name: str
    tier: str
    process: subprocess.Popen[str]


@contextmanager
def module_process(
    folder: Path, name: str, module: str, *arguments: str, token: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A module that prints JSON to stdout, as a process; ended on leaving.

    Args:
        folder: the run's; the log goes to ``logs/NAME.log`` there.
        name: of the process.
        module: what Python runs.
        arguments: of the command line.
        token: of a device.
    """
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    with open(logs / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "CUTLAYER_TOKEN": token, "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield process
        finally:
            try:
                process.wait(15 if sys.exc_info()[0] is None else 0)
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def hub_events(hub: subprocess.Popen[str], folder: Path) -> Iterator[dict[str, Any]]:
    """What a hub's process says, until its end.

    Raises:
        CutlayerError: it failed; with the end of its log.
    """
    assert hub.stdout is not None
    for line in hub.stdout:
        yield json.loads(line)
    if hub.wait() != 0:
        raise CutlayerError(f"the hub failed:\n{tail(folder, 'hub')}")


def watch(
    events: Iterable[dict[str, Any]],
    folder: Path,
    rounds: int,
    console: Console,
    on_round: Callable[[RoundRecord], None],
    table: Callable[[Sequence[RoundRecord]], RenderableType],
) -> list[RoundRecord]:
    """Show the rounds as they come, until the last; returns them.

    Args:
        events: of the hub.
        folder: the run's.
        rounds: how many there will be.
        console: where to show them.
        on_round: called after every round.
        table: what to show of the rounds so far.

    Raises:
        CutlayerError: the hub ended before its time; with the end of its log.
    """
    records: list[RoundRecord] = []
    bar = Progress(TextColumn("   rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    task = bar.add_task("", total=rounds)
    with Live(Group(bar, "   devices start and join"), console=console) as live:
        for event in events:
            if event.pop("event") == "round":
                records.append(RoundRecord(**event))
                on_round(records[-1])
                bar.update(task, completed=len(records))
                live.update(Group(bar, table(records)))
                if len(records) == rounds:
                    break
    if not console.is_terminal:
        console.line()  # there, what is live ends without one
    if len(records) == rounds:
        return records
    raise CutlayerError(f"the hub ended after {len(records)} rounds:\n{tail(folder, 'hub')}")


def device_report(device: DeviceProcess, folder: Path, console: Console) -> dict[str, Any]:
    """What a device printed at its end.

    Raises:
        CutlayerError: it failed, with the end of its log; or it has imported torch.
    """
    with console.status(f"{device.name} measures or writes"):
        out, _ = device.process.communicate(timeout=120)
    if device.process.returncode != 0:
        raise CutlayerError(f"the device {device.name} failed:\n{tail(folder, device.name)}")
    report: dict[str, Any] = json.loads(out)
    if report["torch_imported"]:
        raise CutlayerError(f"the device {device.name} imported torch; a device must not need it")
    return report


def tail(folder: Path, name: str) -> str:
    """The end of the log of a process."""
    lines = (folder / "logs" / f"{name}.log").read_text("utf-8").splitlines()
    return "\n".join(lines[-5:])


def save_npz(path: Path, examples: Examples) -> None:
    """Write examples as ``Examples.from_npz`` reads them."""
    np.savez(path, x=examples.x, y=examples.y)


def traffic_table(traffic: Mapping[str, Mapping[str, int]]) -> Table:
    """Bytes up and down by kind of message."""
    table = Table(title="traffic of the whole job, MB")
    for column in ("message", "up", "down"):
        table.add_column(column, justify="left" if column == "message" else "right")
    for kind, size in sorted(traffic.items(), key=lambda k: -sum(k[1].values())):
        table.add_row(kind, megabytes(size["up"]), megabytes(size["down"]))
    total = {way: sum(s[way] for s in traffic.values()) for way in ("up", "down")}
    table.add_section()
    table.add_row("all", megabytes(total["up"]), megabytes(total["down"]))
    return table
