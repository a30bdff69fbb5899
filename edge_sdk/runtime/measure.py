"""Memory and time of a training step of a bundle on this machine.

Run as ``python -m edge_sdk.runtime.measure FOLDER TIER`` in a process of its own, so that nothing
but the bundle counts; :func:`measure_apart` does that. Memory is resident memory as the kernel
counts it: ``VmHWM`` and ``VmRSS`` of ``/proc/self/status`` where it exists (Linux, Android), else
``ru_maxrss``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.errors import BundleError, CutlayerError
from edge_sdk.protocol.tensors import DTYPES, Array
from edge_sdk.runtime import load_runtime

STEPS = 5
BATCH = 32
LENGTH = 64

_ATTACK = 7
"""Steps of an attack, as :class:`edge_sdk.training.adversarial.Attack` makes them by default."""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_LIBRARIES = {
    "onnx": "onnxruntime",
    "executorch": "executorch.extension.pybindings.portable_lib",
}


@dataclass(frozen=True)
class Measurement:
    """Memory and time of training steps.

    Attributes:
        step_s: median seconds of a step; the first, which loads its graphs, does not count.
        memory_bytes: peak resident memory minus that before the bundle was loaded.
        process_bytes: peak resident memory of the process, interpreter and runtime included.
    """

    step_s: float
    memory_bytes: int
    process_bytes: int


def graphs_of_a_step(known: Collection[str]) -> tuple[str, ...]:
    """Graphs that a training step on a batch runs, in order.

    A bundle with graphs for a special kind of training is measured with that kind: labels that
    stay on the device, gradients that are fused, returned gradients, adversarial examples. Every
    bundle can be trained with ``train`` as well.

    Args:
        known: names of the bundle's graphs.
    """
    kinds = (
        ("activate", "finish", "backward"),
        ("activate", "fuse"),
        ("activate", "backward"),
        (*["attack"] * _ATTACK, "adversarial_train"),
    )
    return next((kind for kind in kinds if set(kind) <= set(known)), ("train",))


def measure(
    folder: Path,
    tier: str,
    batch: int | None = None,
    length: int | None = None,
    steps: int = STEPS,
    threads: int = 1,
) -> Measurement:
    """Run training steps of a bundle on random examples, in this process.

    A step runs the graphs of :func:`graphs_of_a_step`.

    Args:
        folder: folder of bundles.
        tier: tier whose bundle is measured.
        batch: rows of a step; the bundle's limit if it has one, else 32.
        length: tokens of a text; the bundle's limit if it has one, else 64.
        steps: steps to time.
        threads: threads within one operator.

    Raises:
        BundleError: there is no such bundle, or it does not run here.
        DataError: it does not take that batch or length.
    """
    index = BundleIndex.read(folder)
    if tier not in index.tiers:
        raise BundleError(f"{folder} has no tier {tier!r}; it has {', '.join(index.tiers)}")
    manifest = index.manifest(tier)
    graphs = graphs_of_a_step(manifest.graphs)
    feeds = {name: _feeds(manifest, name, batch, length) for name in set(graphs)}
    with contextlib.suppress(ImportError):  # which load_runtime explains
        importlib.import_module(_LIBRARIES.get(manifest.runtime, "onnxruntime"))
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # the peak starts anew from what is resident now
    before, _ = _resident()
    runtime = load_runtime(Bundle.open(manifest, index.blobs().read), threads)
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        for graph in graphs:
            try:
                runtime.run(graph, feeds[graph])
            except CutlayerError:
                raise
            except Exception as error:  # onnxruntime raises bare pybind exceptions
                sizes = {name: list(array.shape) for name, array in feeds[graph].items()}
                raise BundleError(f"the graph {graph!r} fails on {sizes}: {error}") from error
        seconds.append(time.perf_counter() - start)
    _, peak = _resident()
    return Measurement(statistics.median(seconds[1:]), peak - before, peak)


def measure_apart(
    folder: Path,
    tier: str,
    batch: int | None = None,
    length: int | None = None,
    steps: int = STEPS,
    threads: int = 1,
) -> Measurement:
    """:func:`measure` in a fresh process.

    Raises:
        BundleError: the measurement failed; the message says why.
    """
    options = {"--batch": batch, "--length": length, "--steps": steps, "--threads": threads}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "edge_sdk.runtime.measure", *given, "--", str(folder), tier]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode < 0:
        raise BundleError(
            f"measuring {tier} was ended by signal {-process.returncode}; if that is 9, a step "
            "needs more memory than there is here: take a smaller batch"
        )
    if process.returncode > 0:
        lines = process.stderr.strip().splitlines() or ["no reason given"]
        raise BundleError(f"cannot measure {tier}: {lines[-1]}")
    return Measurement(**json.loads(process.stdout))


def _feeds(
    manifest: Manifest, graph: str, batch: int | None, length: int | None
) -> dict[str, Array]:
    """Random inputs of a graph, without the state.

    Hyper-parameters are small numbers, which all of them accept; gradients and features are small
    as well.
    """
    sizes = {
        "batch": batch if batch is not None else manifest.limits.get("batch", BATCH),
        "seq": length if length is not None else min(manifest.limits.get("seq", LENGTH), LENGTH),
    }
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for port in manifest.graphs[graph].inputs:
        spec = port.spec
        shape = [sizes[n] if isinstance(n, str) else n for n in spec.shape]
        if port.role == "hyper":
            feeds[spec.name] = np.full(shape, 1e-3, DTYPES[spec.dtype])
        elif port.role == "seed":
            feeds[spec.name] = np.zeros(shape, DTYPES[spec.dtype])
        elif port.role == "packed":
            feeds[spec.name] = rng.uniform(0, 1e-3, shape).astype(DTYPES[spec.dtype])
        elif spec.name == "present":
            feeds[spec.name] = np.ones(shape, DTYPES[spec.dtype])
        elif port.role == "batch" and spec.dtype == "float32":
            feeds[spec.name] = rng.standard_normal(shape, np.float32)
        elif port.role == "batch":
            bounds: tuple[int, ...] = (manifest.classes - 1,)
            if spec.name == "x":
                bounds = manifest.highest or (1,)
            high = np.asarray(bounds) + 1
            feeds[spec.name] = rng.integers(high, size=shape).astype(DTYPES[spec.dtype])
    return feeds


def _resident() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and the peak."""
    if not _STATUS.exists():
        try:
            import resource
        except ImportError as error:
            raise BundleError("memory cannot be measured on this system; use Linux") from error
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return peak, peak
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m edge_sdk.runtime.measure FOLDER TIER``: print a :class:`Measurement` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m edge_sdk.runtime.measure")
    parser.add_argument("folder", type=Path)
    parser.add_argument("tier")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        result = measure(**vars(given))
    except CutlayerError as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
