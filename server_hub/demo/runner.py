"""What the demos share: a run from the data to the report, with a hub and devices as processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from rich.console import Console

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import CutlayerError
from edge_sdk.inference.metrics import Metric
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples
from export.bundles.model_source import model_of
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import WEIGHTS, SplitModel
from export.lowering.export_cache import ExportCache
from server_hub.demo.processes import (
    CUTLAYER,
    HubProcess,
    device_report,
    hub_process,
    module_process,
    tail,
)
from server_hub.gateway.tokens import TokenFile
from server_hub.reports.progress import rounds_view
from server_hub.reports.report import write_report
from server_hub.reports.rounds import devices_table, traffic_table
from server_hub.reports.table import Table
from server_hub.reports.values import shown
from server_hub.storage.run_folder import RoundRecord, RunFolder

TOLERANCE = 0.02
"""The most that the saved model may differ from the path through the hub, which packs the
activations at the cut: in accuracy, or as a part of perplexity."""

OnRound = Callable[[RoundRecord], None]


@dataclass(frozen=True)
class DemoDevice:
    """A device of a demo.

    Attributes:
        name: name of the device.
        tier: name of its tier.
        data: its examples.
        arguments: its command line, beside address, data and cache.
        module: module that its process runs.
    """

    name: str
    tier: str
    data: Examples
    arguments: Sequence[str] = ()
    module: str = CUTLAYER


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a demo trains, and on which devices.

    Attributes:
        model: the model to export.
        example: some inputs of the model (rows, ...), for the export.
        held_out: examples to measure on.
        devices: the devices.
        tiers: what is exported for each tier.
        export: further arguments of :func:`export.bundles.writer.export_bundles`.
        hub: tables of ``hub.toml``; the runner adds paths, port, and number of rounds and devices.
        found: what was measured before training, for the results.
    """

    model: SplitModel
    example: Array
    held_out: Examples
    devices: Sequence[DemoDevice]
    tiers: Mapping[str, Tier]
    export: Mapping[str, Any]
    hub: Mapping[str, Any]
    found: Mapping[str, Any] = field(default_factory=dict)


class Demo(Protocol):
    """What is a demo's own; :func:`run_demo` does the rest.

    Attributes:
        title: heading of its report.
        metric: what it measures.
    """

    title: ClassVar[str]
    metric: ClassVar[Metric]

    @property
    def rounds(self) -> int:
        """Rounds of federated training."""

    def prepare(self, run: DemoRun) -> Setup:
        """Load the data, build the model, and say so."""

    def measure(self, run: DemoRun) -> dict[str, Any]:
        """Measure what was trained; a hub with ``keep_serving`` still answers."""

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """The tables of the results."""

    def remarks(self, result: Mapping[str, Any]) -> list[str]:
        """Paragraphs of the report, in Markdown, after its tables."""

    def reference(self, result: Mapping[str, Any]) -> tuple[str, float] | None:
        """Name and value of a line to compare the curves with."""


class DemoRun:
    """A run of a demo: its folder, and what is known so far.

    Attributes:
        folder: the run's folder.
        inputs: folder of the devices' data, inside of it.
        console: where to show what happens.
        setup: see :class:`Setup`, once the demo is prepared.
        index: the bundles, once they are exported.
        tokens: tokens of the devices.
        hub: the hub's process, once it listens.
        records: the rounds, once they are over.
        reports: what each device printed at its end.
        traffic: bytes up and down by kind of message.
        seconds: duration of the training in seconds.
        stack: ends the processes.
    """

    setup: Setup
    index: BundleIndex
    hub: HubProcess
    records: list[RoundRecord]
    reports: list[dict[str, Any]]
    traffic: dict[str, dict[str, int]]
    seconds: float

    def __init__(self, folder: Path, console: Console, stack: ExitStack) -> None:
        self.folder, self.console, self.stack = folder.absolute(), console, stack
        self.inputs = self.folder / "input"
        self.inputs.mkdir(parents=True)
        self.tokens = TokenFile(self.folder / "tokens.toml")
        self._step = 0

    def step(self, text: str) -> None:
        """Announce the next step, with its number."""
        self._step += 1
        self.console.print(f"[bold]{self._step}[/]  {text}")

    def say(self, text: str) -> None:
        """A line that belongs to the step."""
        self.console.print(f"   {text}")

    def start(self, name: str, module: str, *arguments: str, token: str) -> subprocess.Popen[str]:
        """Start a process, which ends with the run at the latest."""
        process = module_process(self.folder, name, module, *arguments, token=token)
        return self.stack.enter_context(process)

    def export(self) -> None:
        """Export the bundles, and say how large they are."""
        setup = self.setup
        self.step("export: each tier's steps to ONNX, checked against PyTorch")
        with self.console.status("") as status:
            self.index = export_bundles(
                setup.model,
                setup.tiers,
                self.folder / "bundles",
                example=torch.from_numpy(setup.example),
                cache=ExportCache.of_user(),
                progress=status.update,
                **setup.export,
            )
        for name, entry in self.index.tiers.items():
            size = sum(self.index.manifest(name).blobs.values())
            self.say(
                f"{name:7s} cut {entry.cut} of {setup.model.depth}, bundle {size / 1e3:.0f} kB"
            )

    def train(self, rounds: int, on_round: OnRound) -> None:
        """Start hub and devices, show the rounds, and wait for the devices' reports.

        Raises:
            CutlayerError: a process ended too early or failed; with the end of its log.
        """
        devices = self.setup.devices
        self.step(
            f"train: a hub and {len(devices)} devices, a process each, connected by websockets"
        )
        started = time.monotonic()
        secrets = {device.name: self.tokens.issue(device.name, device.tier) for device in devices}
        held_out = self.folder / "held_out.npz"  # stays, to measure exports of the model with
        save_npz(held_out, self.setup.held_out)
        settings = {
            "bundles": self.folder / "bundles",
            "tokens": self.tokens.path,
            "run": self.folder,
            "held_out": held_out,
            "rounds": {"count": rounds, "min_devices": len(devices)},
            **self.setup.hub,
        }
        self.hub = self.stack.enter_context(hub_process(self.folder, settings))
        processes = {}
        for device in devices:
            data = self.inputs / f"{device.name}.npz"
            save_npz(data, device.data)
            command = ["device"] if device.module == CUTLAYER else []
            processes[device.name] = self.start(
                device.name, device.module, *command, "--url", self.hub.address,
                "--data", str(data), "--cache", str(self.folder / "cache" / device.name),
                *device.arguments, token=secrets[device.name],
            )  # fmt: skip
        self.records = self._watch(rounds, on_round)
        self.seconds = time.monotonic() - started
        self.reports = []
        for name, process in processes.items():
            with self.console.status(f"waiting for the report of {name}"):
                self.reports.append(device_report(process, name, self.folder))
        self.traffic = self.records[-1].bytes
        if self.setup.hub.get("keep_serving"):
            self.stack.callback(self.hub.process.terminate)
        else:
            self.traffic = next(e["bytes"] for e in self.hub.events if e["event"] == "done")

    def _watch(self, rounds: int, on_round: OnRound) -> list[RoundRecord]:
        """Show the rounds as they come; returns them after the last."""
        records: list[RoundRecord] = []
        with rounds_view(self.console, "   rounds", rounds) as show:
            for event in self.hub.events:
                if event.pop("event") == "round":
                    records.append(RoundRecord(**event))
                    on_round(records[-1])
                    show(records[-1])
                    if len(records) == rounds:
                        return records
        raise CutlayerError(
            f"the hub ended after {len(records)} rounds:\n{tail(self.folder, 'hub')}"
        )

    def trained_model(self, weights: str = WEIGHTS) -> SplitModel:
        """A fresh PyTorch model with weights that the hub has saved, in evaluation mode."""
        model = model_of(self.index.model, self.index.extra, None)
        model.load(self.folder / weights)
        return model.eval()


def run_demo(
    demo: Demo, folder: Path, console: Console, on_round: OnRound = lambda record: None
) -> dict[str, Any]:
    """Run a demo: prepare, export, train, measure, show and report.

    Args:
        demo: which one.
        folder: a new folder for all files of the run.
        console: where to show what happens.
        on_round: called after every round.

    Returns:
        What the demo has measured, with ``rounds``, ``bytes`` by kind of message,
        ``device_rss_mb`` of the largest device process, ``training_seconds`` and ``seconds``.

    Raises:
        CutlayerError: a process ended too early or failed, with the end of its log; or the saved
            model does not answer as the hub did.
    """
    started = time.monotonic()
    files = RunFolder(folder.absolute(), metric=demo.metric)
    with ExitStack() as stack:
        run = DemoRun(folder, console, stack)
        run.setup = demo.prepare(run)
        run.export()
        run.train(demo.rounds, on_round)
        measured = demo.measure(run)
    result = {
        **run.setup.found,
        **measured,
        "rounds": len(run.records),
        "bytes": run.traffic,
        "device_rss_mb": max(report["rss_mb"] for report in run.reports),
        "training_seconds": round(run.seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    tables = demo.tables(result)
    said = [record for record in run.records if record.on_devices]
    on_devices = [devices_table(record) for record in said[-1:]]
    for table in (*tables, *on_devices, traffic_table(run.traffic)):
        console.print(table.rich())
    speed = (
        f"{result['rounds']} rounds in {run.seconds:.0f} s; largest device process: "
        f"{result['device_rss_mb']:.0f} MB, without torch"
    )
    console.print(f"{speed}; {result['seconds']:.0f} s in all")
    files.records.extend(run.records)
    write_report(
        files,
        demo.title,
        [*(table.markdown() for table in tables), *demo.remarks(result), f"{speed}."],
        demo.reference(result),
    )
    console.print(
        f"report, pictures, metrics and model in {run.folder}", soft_wrap=True, markup=False
    )
    return result


def check_saved_model(saved: float, through_hub: Mapping[str, float], metric: Metric) -> None:
    """Check that the saved model answers as the devices and the hub together did.

    Args:
        saved: accuracy or perplexity of the saved model, uncut, in PyTorch.
        through_hub: that of the path through the hub, by tier.
        metric: which of the two it is.

    Raises:
        CutlayerError: they differ by more than :data:`TOLERANCE`.
    """
    for tier, value in through_hub.items():
        difference = value - saved if metric == "accuracy" else value / saved - 1
        if abs(difference) > TOLERANCE:
            raise CutlayerError(
                f"the saved model has {metric} {shown(saved, metric)}, the path through the hub "
                f"from tier {tier} {shown(value, metric)}; they must agree within {TOLERANCE:.0%}"
            )


def save_npz(path: Path, examples: Examples) -> None:
    """Write examples as :meth:`Examples.from_npz` reads them."""
    np.savez(path, x=examples.x, y=examples.y)
