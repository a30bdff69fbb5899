"""Sizes, quality and latency of the formats that ``cutlayer model export`` writes.

    python -m benchmarks.ship RUN... [--json FILE]

Each run is written in every format that it can take, with its own head alone. Beside it are two
files that do without Cutlayer, from the same weights: ``torch.onnx.export`` of the model, and ONNX
Runtime's dynamic quantization of that file. Latencies are medians of answers to one row, on one
thread; all ONNX files of a run take turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import onnx
import onnxruntime as ort
import torch
import typer
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

from edge_sdk.errors import CutlayerError
from edge_sdk.inference.metrics import metric_of
from export.adapters_lora.lora import merge
from export.formats.card import shown
from export.formats.checking import Run, scores
from export.formats.inference import heads_of, silenced
from export.formats.onnx_file import OPSET, open_onnx
from export.formats.ship import FORMATS, Choice, ship
from export.formats.trained import TrainedModel
from server_hub.reports.files import write_rows
from server_hub.reports.table import Table
from server_hub.storage.trained_run import TrainedRun

ROUNDS = 200
"""Number of answers of each ONNX file that are timed."""


@dataclass(frozen=True)
class Row:
    """A file or folder.

    Attributes:
        run: name of the run.
        file: what was written.
        opened_by: what opens it.
        kilobytes: its size.
        metric: ``accuracy`` or ``perplexity``.
        score: accuracy or perplexity on the held-out examples; None for weights.
        milliseconds: median time of an answer to one row; None for weights.
        ratio: this time as a multiple of that of ``torch.onnx.export``; None for other runtimes.
    """

    run: str
    file: str
    opened_by: str
    kilobytes: float
    metric: str
    score: float | None
    milliseconds: float | None
    ratio: float | None = None


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
) -> None:
    """Write runs in all formats, and compare sizes, quality and latency."""
    console = Console(stderr=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for number, run in enumerate(runs):
            status.update(str(run))
            rows += measure(run, Path(folder) / str(number))
            if out is not None:
                write_rows(out, [asdict(row) for row in rows])
    Console().print(table(rows).rich())


def measure(run: Path, folder: Path) -> list[Row]:
    """Write one run in all formats, and measure each."""
    rows, sessions = [], {}
    for name, kind in FORMATS.items():
        trained = TrainedRun.read(run).trained(None, None, None, whole=True)
        head = heads_of(trained.model)[-1]
        heads = [head] if kind.graph and not trained.bases else []
        try:
            card = ship(trained, Choice([name], heads=heads, allow_loss=True), folder / name)
        except CutlayerError as error:
            Console(stderr=True).print(f"{run.name}: {error}", highlight=False)
            continue
        (file,) = card.files
        rows.append(
            Row(run.name, file.path, file.opened_by, file.size / 1e3, card.metric,
                file.scores.get(head), file.latency_ms)
        )  # fmt: skip
        if name.startswith("onnx"):
            sessions[file.path] = open_onnx(folder / name / file.path)
    trained = TrainedRun.read(run).trained(None, None, None, whole=True)
    if not trained.bases:
        rows += _plain(trained, folder, run.name, sessions)
    latencies = _take_turns(sessions, trained.rows()[:1])
    base = latencies.get("torch.onnx")
    return [
        replace(
            row,
            milliseconds=latencies[row.file],
            ratio=None if base is None else latencies[row.file] / base,
        )
        if row.file in latencies
        else row
        for row in rows
    ]


def _plain(trained: TrainedModel, folder: Path, run: str, sessions: dict[str, Run]) -> list[Row]:
    """Write the model without Cutlayer, by torch and by ONNX Runtime's quantization."""
    merge(trained.model)
    model: nn.Module = trained.model.eval()
    x = trained.rows()
    symbols = {1: Dim("seq")} if "seq" in trained.signature(None, {}).x.shape else {}
    path, folded, quantized = (folder / n for n in ("torch.onnx", "folded.onnx", "dynamic.onnx"))
    with silenced():
        torch.onnx.export(
            model, (x,), path, dynamo=True, verbose=False, external_data=False,
            opset_version=OPSET, input_names=["x"], output_names=["head"],
            dynamic_shapes=({0: Dim("batch"), **symbols},),
        )  # fmt: skip
        plain = onnx.load(path)
        plain.graph.ClearField("value_info")
        onnx.save(plain, path)
        quant_pre_process(path, folded, skip_symbolic_shape=True)
        quantize_dynamic(folded, quantized, weight_type=QuantType.QInt8, per_channel=True)
    rows = []
    for file, opened_by in ((path, "torch.onnx.export"), (quantized, "quantize_dynamic")):
        sessions[file.name] = session = open_onnx(file)
        score = None
        if trained.held_out is not None:
            score = scores(session, ["head"], trained.held_out, trained.model.task, {})["head"]
        metric = metric_of(trained.model.task)
        size = file.stat().st_size / 1e3
        rows.append(Row(run, file.name, opened_by, size, metric, score, None))
    return rows


def _take_turns(sessions: dict[str, Run], x: Tensor) -> dict[str, float]:
    """Median time of an answer in milliseconds by file."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(ROUNDS + 5):
        for name, run in sessions.items():
            began = time.perf_counter()
            run({"x": x.numpy()})
            if number >= 5:
                times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def table(rows: list[Row]) -> Table:
    """Return a table with a row per file."""
    cells = [
        [
            r.run,
            r.file,
            r.opened_by,
            f"{r.kilobytes:,.0f}",
            "-" if r.score is None else shown(r.metric, r.score),
            "-" if r.milliseconds is None else f"{r.milliseconds:.2f}",
            "-" if r.ratio is None else f"{r.ratio:.2f}",
        ]
        for r in rows
    ]
    header = ["run", "file", "opened or written by", "kB", "score", "ms", "ratio"]
    return Table("Formats of trained models", header, cells, 3)


if __name__ == "__main__":
    ort.set_default_logger_severity(3)
    typer.run(main)
