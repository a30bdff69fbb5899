"""Speed of several base networks in one pass against one at a time, on a device and in the trunk.

    python -m benchmarks.mix_speed [--json FILE]

The wide model is that of ``cutlayer demo --mix``, split into eight base networks. On the device,
ONNX Runtime mixes N bases in one call of ``mix_N``, or in N calls of ``mix_1``. In the trunk, with
the cut after the stem and the first block, one step trains eight stacked bases on a batch each, or
eight trunks train one base each. Both sides run in turns in one process with one thread; times are
medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.protocol.batch import Batch
from edge_sdk.runtime import load_runtime
from export.bases.exported import WholeBases, whole_bases
from export.bases.split_width import split_width
from export.bundles.writer import Tier, export_bundles
from export.packing.codecs import get_codec
from server_hub.demo.mix_model import BASES, build
from server_hub.reports.files import write_rows
from server_hub.reports.table import Table
from server_hub.simulation.digits import CLASSES
from server_hub.trunk.interface import StepInput, TrunkPlan
from server_hub.trunk.step import TrunkTrainer

MIXED = (1, 2, 4, 8)
ROWS = (1, 16)
CUT, BATCHES = 1, (16, 64)
PLAN = TrunkPlan("sgd", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0}, max_norm=25.0)


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Number of runs of each side.")] = 30,
) -> None:
    """Measure both."""
    torch.set_num_threads(1)
    example = torch.rand(64, 1, 8, 8)
    bases = whole_bases(split_width(build(), BASES, example), [CUT], example, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*on_device(bases, example, Path(folder) / "bundles", repeats)]
    rows += in_trunk(bases, example, repeats)
    cells = [
        [
            str(row["where"]),
            str(row["bases"]),
            str(row["rows"]),
            *(f"{row[key]:.2f}" for key in ("one_pass_ms", "one_by_one_ms", "ratio")),
        ]
        for row in rows
    ]
    header = ["where", "bases", "rows", "one pass", "one by one", "ratio"]
    title = "Milliseconds of one pass, and of one base after the other"
    Console(highlight=False).print(Table(title, header, cells).rich())
    if json_file is not None:
        write_rows(json_file, rows)


def on_device(
    bases: WholeBases, example: torch.Tensor, folder: Path, repeats: int
) -> list[dict[str, float | str]]:
    """Measure answers of a device that has whole base networks."""
    tier = Tier(bases.hub.depth - 1, bases=BASES)
    index = export_bundles(
        bases.hub, {"phone": tier}, folder, example=example, classes=CLASSES, bases=bases
    )
    manifest = index.manifest("phone")
    runtime = load_runtime(Bundle.open(manifest, index.blobs().read), 1)
    stacked = {f"bases/{s.name}": bases.states[s.name] for s in manifest.exchanged()}
    found = []
    for rows in ROWS:
        x = example[:rows].numpy()
        for count in MIXED:
            together = {n: t[:count] for n, t in stacked.items()} | {"x": x}
            each = [{n: t[b : b + 1] for n, t in stacked.items()} | {"x": x} for b in range(count)]

            def one_pass(count: int = count, feeds: dict[str, np.ndarray] = together) -> object:
                return runtime.run(f"mix_{count}", feeds)["logits"]

            def one_by_one(feeds: list[dict[str, np.ndarray]] = each) -> object:
                return np.mean([runtime.run("mix_1", own)["logits"] for own in feeds], axis=0)

            np.testing.assert_allclose(one_pass(), one_by_one(), rtol=1e-3, atol=1e-4)
            found.append(row_of("device", count, rows, one_pass, one_by_one, repeats))
    return found


def in_trunk(
    bases: WholeBases, example: torch.Tensor, repeats: int
) -> list[dict[str, float | str]]:
    """Measure steps of the trunk."""
    rng = np.random.default_rng(0)
    present = np.ones(CLASSES, np.float32)
    stacked = TrunkTrainer(bases.hub, "cpu")
    stacked.begin(bases.states, replace(PLAN, bases=BASES))
    single = [TrunkTrainer(bases.hub, "cpu") for _ in range(BASES)]
    for base, trunk in enumerate(single):
        trunk.begin({n: t[base] for n, t in bases.states.items()}, PLAN)
    found = []
    for rows in BATCHES:
        with torch.no_grad():
            h = bases.hub.segment(torch.rand(rows, *example.shape[1:]), CUT)
        parts = {n: p.numpy() for n, p in get_codec("fp16").pack(h, 1).items()}
        inputs = [
            StepInput(
                "device",
                "bases",
                CUT,
                "fp16",
                Batch(parts, rng.integers(0, CLASSES, rows), base=base, present=present),
            )
            for base in range(BASES)
        ]

        def one_pass(inputs: list[StepInput] = inputs) -> object:
            return stacked.step(inputs)

        def one_by_one(inputs: list[StepInput] = inputs) -> object:
            return [
                trunk.step([replace(own, batch=replace(own.batch, base=0, present=None))])
                for trunk, own in zip(single, inputs, strict=True)
            ]

        found.append(row_of("trunk", BASES, rows, one_pass, one_by_one, repeats))
    return found


def row_of(
    where: str,
    bases: int,
    rows: int,
    one_pass: Callable[[], object],
    one_by_one: Callable[[], object],
    repeats: int,
) -> dict[str, float | str]:
    """Run both sides in turns and return their medians."""
    seconds: dict[Callable[[], object], list[float]] = {one_pass: [], one_by_one: []}
    for repeat in range(repeats + 2):  # the first two warm up
        for side, times in seconds.items():
            started = time.perf_counter()
            side()
            if repeat >= 2:
                times.append(time.perf_counter() - started)
    first, second = (1e3 * statistics.median(times) for times in seconds.values())
    return {
        "where": where, "bases": bases, "rows": rows, "one_pass_ms": first,
        "one_by_one_ms": second, "ratio": first / second,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
