"""One training step on a device: exported segments against eager PyTorch, time and memory.

    python -m benchmarks.device_step [--family NAME]... [--runtime NAME]... [--json FILE]

Times are medians of two kinds of steps that alternate in one process, on the same threads: the
exported step in the runtime of ``edge_sdk``, and forward, backward, optimizer step and packing in
eager PyTorch. The ratio is the median of five rounds of such steps, and its range is theirs. With
more than one thread on ONNX Runtime, steps of the same graph on one thread take turns with both,
and the results must be equal.

The memory is the peak of a separate process that only runs the step: one process with ``edge_sdk``
and the bundle, one with PyTorch and the model. ExecuTorch's Python binding needs torch, so its
process has torch too; a phone needs no torch. ``step_mb`` is the peak above the memory of the
process before it opened the bundle or built the model.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from server_hub.reports.files import write_rows
from server_hub.reports.table import Table

STEPS = 25
"""Number of timed steps after :data:`WARM_UP`; at least 20 for the medians of the rounds."""

ROUNDS = 5
"""Number of rounds into which the steps are divided."""

WARM_UP = 3

RUNTIMES = ("onnx", "executorch")
NAMES = (
    "conv-groupnorm",
    "mobilenet-v2",
    "vit",
    "gpt2-lora-256",
    "gpt2-lora-768",
    "llama-lora",
)


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        ratio: time as a multiple of the eager time.
        ratio_low: smallest ratio of a round.
        ratio_high: largest ratio of a round.
        speedup: time on one thread as a multiple of the time on all; None for one thread.
        overhead: time that the Python runtime adds to the bare call into ONNX Runtime, as a
            fraction of the latter; None for ExecuTorch.
        step_mb: peak memory above that of the imports.
    """

    family: str
    runtime: str
    memory: str
    threads: int
    batch: int
    median_ms: float
    eager_median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    speedup: float | None
    peak_mb: float
    eager_peak_mb: float
    overhead: float | None
    step_mb: float
    eager_step_mb: float


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Family to measure.", show_default="all")
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Runtime to measure.", show_default="both")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="normal, or low: the setting of a tier on ONNX Runtime.")
    ] = "normal",
    threads: Annotated[int, typer.Option(help="Number of threads of each side.")] = 1,
    steps: Annotated[int, typer.Option(help="Number of steps to time.", min=20)] = STEPS,
    out: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
) -> None:
    """Measure one training step of exported segments against eager PyTorch."""
    console = Console(stderr=True)
    rows = []
    with console.status("") as status:
        for name in family or NAMES:
            eager: dict[str, float] = {}
            for one in runtime or (RUNTIMES if memory == "normal" else ("onnx",)):
                with tempfile.TemporaryDirectory() as folder:
                    status.update(f"{name}: exporting for {one}")
                    _child("export", name, one, folder, memory)
                    status.update(f"{name}: timing {one}")
                    timed = _child("time", name, one, folder, str(threads), str(steps))
                    status.update(f"{name}: memory")
                    peak = _child("peak", name, one, folder, str(threads))
                    eager = eager or _child("eager-peak", name, str(threads))
                row = Row(
                    name,
                    one,
                    memory,
                    threads,
                    **timed,
                    **peak,
                    eager_peak_mb=eager["peak_mb"],
                    eager_step_mb=eager["step_mb"],
                )
                rows.append(row)
                if out is not None:  # after every row, so an interrupted run keeps its rows
                    write_rows(out, [asdict(row) for row in rows])
                console.print(
                    f"{name}, {one}: {row.median_ms:.1f} ms, {row.ratio:.2f} x eager "
                    f"({row.ratio_low:.2f} to {row.ratio_high:.2f}), "
                    f"{row.peak_mb:.0f} of {row.eager_peak_mb:.0f} MB"
                )
    Console().print(table(rows).rich())


def table(rows: list[Row]) -> Table:
    """Return a table with a row per family and runtime."""
    header = ["family", "runtime", "rows", "ms", "eager ms", "ratio", "range", "speedup", "MB",
              "eager MB", "step MB", "eager step MB", "overhead"]  # fmt: skip
    cells = [
        [
            r.family,
            r.runtime,
            str(r.batch),
            f"{r.median_ms:.1f}",
            f"{r.eager_median_ms:.1f}",
            f"{r.ratio:.2f}",
            f"{r.ratio_low:.2f}-{r.ratio_high:.2f}",
            "-" if r.speedup is None else f"{r.speedup:.2f}",
            f"{r.peak_mb:.0f}",
            f"{r.eager_peak_mb:.0f}",
            f"{r.step_mb:.0f}",
            f"{r.eager_step_mb:.0f}",
            "-" if r.overhead is None else f"{100 * r.overhead:.1f} %",
        ]
        for r in rows
    ]
    return Table("One training step on the device", header, cells, 2)


def _child(*arguments: str) -> dict[str, Any]:
    """Run a part of the measurement in a separate process; return the last line it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device_step", "--child", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- what the children do ------------------------------------------------------------------------


def _export(name: str, runtime: str, folder: str, memory: str) -> dict[str, Any]:
    from benchmarks.families import FAMILIES
    from export.bundles.writer import Tier, export_bundles

    family = FAMILIES[name]
    batch = len(family.x)
    tier = Tier(family.cut, "int8", runtime, batch, memory=memory)  # type: ignore[arg-type]
    export_bundles(
        family.model(),
        {"tier": tier},
        Path(folder) / "bundles",
        example=family.x,
        classes=family.classes,
        optimizer=family.optimizer,
    )
    np.savez(Path(folder) / "batch.npz", x=family.x.numpy(), y=family.labels().numpy())
    return {}


def _time(name: str, runtime: str, folder: str, threads: str, steps: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(int(threads))
    step, bare = _exported(folder, int(threads), runtime == "onnx")
    eager, _ = _eager(name)
    kinds = {"exported": step, "bare": bare, "eager": eager}
    if int(threads) > 1 and runtime == "onnx":  # XNNPACK has one thread pool for all programs
        kinds["alone"], _ = _exported(folder, 1, False)
        _check_same(*(_exported(folder, n, False)[0]() for n in (1, int(threads))))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(WARM_UP + int(steps)):
        for kind, run in kinds.items():
            began = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[kind].append(time.perf_counter() - began)
    median = {kind: 1000 * statistics.median(values) for kind, values in times.items()}
    rounds = [
        statistics.median(times["exported"][part]) / statistics.median(times["eager"][part])
        for part in _rounds(int(steps))
    ]
    with np.load(Path(folder) / "batch.npz") as batch:
        rows = len(batch["x"])
    return {
        "batch": rows,
        "median_ms": median["exported"],
        "eager_median_ms": median["eager"],
        "ratio": statistics.median(rounds),
        "ratio_low": min(rounds),
        "ratio_high": max(rounds),
        "speedup": median["alone"] / median["exported"] if "alone" in median else None,
        "overhead": median["exported"] / median["bare"] - 1 if runtime == "onnx" else None,
    }


def _rounds(steps: int) -> list[slice]:
    """Return the steps of each round."""
    bounds = [steps * i // ROUNDS for i in range(ROUNDS + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _check_same(one: dict[str, Any], more: dict[str, Any]) -> None:
    """Exit unless results of one thread and of more are equal up to rounding."""
    for name, wanted in one.items():
        exact = np.asarray(wanted, np.float64)
        slack = 1.0 if wanted.dtype == np.int8 else 1e-5 * max(np.abs(exact).max(), 1e-30)
        if np.abs(more[name] - exact).max() > slack:
            raise SystemExit(f"{name} depends on the number of threads")


def _peak(name: str, runtime: str, folder: str, threads: str) -> dict[str, Any]:
    if runtime == "executorch":
        from edge_sdk.runtime.executorch_binding import load_binding

        load_binding()
    else:
        import edge_sdk.runtime.onnx  # noqa: F401
    before = _status_mb("VmRSS")
    step, _ = _exported(folder, int(threads), False)
    for _ in range(WARM_UP):
        step()
    peak = _status_mb("VmHWM")
    return {"peak_mb": peak, "step_mb": peak - before}


def _eager_peak(name: str, threads: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(int(threads))
    eager, model_mb = _eager(name)
    before = _status_mb("VmRSS") - model_mb  # building the model imports the rest
    for _ in range(WARM_UP):
        eager()
    peak = _status_mb("VmHWM")
    return {"peak_mb": peak, "step_mb": peak - before}


def _exported(folder: str, threads: int, bare: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a step in the runtime of ``edge_sdk``, and the bare call inside that step."""
    from edge_sdk.bundle.index import BundleIndex
    from edge_sdk.bundle.manifest import Bundle
    from edge_sdk.runtime import load_runtime

    index = BundleIndex.read(Path(folder) / "bundles")
    manifest = index.manifest("tier")
    runtime = load_runtime(Bundle.open(manifest, index.blobs().read), threads)
    ports = manifest.graphs["train"].inputs
    hyper = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
             "eps": 1e-8, "max_norm": 0.0}  # fmt: skip
    with np.load(Path(folder) / "batch.npz") as arrays:
        batch = {"x": arrays["x"], "y": arrays["y"]}
    batch |= {p.spec.name: np.float32(hyper[p.spec.name])[...] for p in ports if p.role == "hyper"}
    batch |= {p.spec.name: np.asarray(7) for p in ports if p.role == "seed"}

    def step() -> Any:
        return runtime.run("train", batch)

    step()
    return step, bare_call(runtime, batch) if bare else step


def bare_call(runtime: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """Return the bare call into ONNX Runtime, with all tensors bound beforehand.

    The step ``train`` must have run once.
    """
    spec, bound = runtime.manifest.graphs["train"], runtime._bound["train"]
    binding = bound.bindings[runtime._current]
    for port in spec.inputs:
        if port.role != "state":
            binding.bind_cpu_input(port.spec.name, batch[port.spec.name])
    for port in spec.outputs:
        if port.role != "state":
            binding.bind_output(port.spec.name, "cpu")
    return lambda: bound.session.run_with_iobinding(binding)


def _eager(name: str) -> tuple[Callable[[], Any], float]:
    """Return the exported step in eager PyTorch, and the size of the model's tensors in MB."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.families import FAMILIES
    from export.cutting.channels import channel_axis
    from export.cutting.split_model import ClientSegment
    from export.packing.codecs import get_codec
    from export.steps.optimizers import get_optimizer

    family = FAMILIES[name]
    segment = ClientSegment(family.model(), family.cut).train()
    rule, codec, y = get_optimizer(family.optimizer), get_codec("int8"), family.labels()
    trained: list[torch.Tensor] = [p for p in segment.parameters() if p.requires_grad]
    optimizer = rule.reference(trained, rule.hyper)

    def step() -> None:
        h, logits = segment(family.x)
        loss = sum(cross_entropy(z.reshape(-1, family.classes), y.reshape(-1)) for z in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        codec.pack(h, channel_axis(h, segment.channels))

    return step, sum(t.nbytes for t in segment.state_dict().values()) / 1e6


def _status_mb(key: str) -> float:
    """Return memory of this process in MB: resident now (``VmRSS``) or at its peak (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {key}; this measurement needs Linux")


_CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "export": _export,
    "time": _time,
    "peak": _peak,
    "eager-peak": _eager_peak,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        typer.run(main)
