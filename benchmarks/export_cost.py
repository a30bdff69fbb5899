"""Seconds and peak memory of an export, by stage.

    python -m benchmarks.export_cost [--case NAME]... [--no-verify] [--cache DIR] [--json FILE]

Each case is exported in a process of its own, with returned gradients, from random weights; with
LoRA of rank 8, or fully trained with SGD. Memory is resident memory, memory-mapped files included;
the kernel's own mark of the peak is read and reset wherever a stage begins or ends, so a peak is
that of the stage alone. Linux only. A stage that runs inside another is not counted in the outer
one. With ``--cache``, a case that is run again shows what a second export costs.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from server_hub.reports.files import write_rows
from server_hub.reports.table import Table

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
"""Configuration of GPT-2 small: transformers' defaults, 124 million parameters."""

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 64,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Configuration of Llama-3.2-1B."""

CASES: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "gpt2-small-cut-2": (GPT2, 2, 8),
    "gpt2-small-cut-2-full": (GPT2, 2, None),
    "llama-3.2-1b-cut-1": (LLAMA, 1, 8),
    "llama-3.2-1b-cut-4": (LLAMA, 4, 8),
}
"""Configuration, cut and rank of the adapters of each case; without a rank it is fully trained."""

STAGES = {
    "model": [("export.bundles.model_source", "build_model")],
    "checks": [
        ("export.bundles.writer", name)
        for name in ("check_stages", "check_sharing", "check_classes", "check_parameters")
    ],
    "ranges": [("export.bundles.writer", "find_ranges")],
    "steps": [("export.bundles.writer", "make_steps")],
    "constants": [("export.bundles.writer", "store_constants")],
    "trace": [("export.lowering.onnx", "traced")],
    "lower": [("export.bundles.writer", "lower")],
    "verify": [
        ("export.lowering.verification.verify.Verifier", name) for name in ("verify", "holds")
    ],
    "save": [("export.cutting.split_model.SplitModel", "save")],
}
"""Functions whose calls make up each stage, as module (or class) and name."""


@dataclass
class Row:
    """Cost of an export.

    Attributes:
        case: name of the case.
        verified: whether the graphs were compared with eager PyTorch.
        commit: commit of the code that ran.
        cached: whether an equal export was in the cache.
        model_mb: size of the model's tensors, in 10^6 bytes.
        segment_mb: size of the client segment's tensors, heads included.
        seconds: seconds by stage, and in all.
        cpu_s: processor time by stage, and in all: on a busy machine the better figure.
        peak_mb: peak resident memory by stage, and of the process.
    """

    case: str
    verified: bool
    commit: str
    cached: bool = False
    model_mb: float = 0.0
    segment_mb: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)


class Stages:
    """Seconds and peak memory by stage, of which one is current."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}
        self.peak_mb: dict[str, float] = {}
        self._current = ["rest"]
        self._since = time.perf_counter(), time.process_time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Make a stage the current one inside the block."""
        self.settle()
        self._current.append(name)
        try:
            yield
        finally:
            self.settle()
            self._current.pop()

    def settle(self) -> None:
        """Count time and peak so far in the current stage."""
        name = self._current[-1]
        now = time.perf_counter(), time.process_time()
        for kept, new, old in zip((self.seconds, self.cpu_s), now, self._since, strict=True):
            kept[name] = kept.get(name, 0.0) + new - old
        self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), _take_peak_mb())
        self._since = time.perf_counter(), time.process_time()

    def watch(self, name: str, owner: str, function: str) -> None:
        """Let every call of a function be part of a stage.

        Args:
            name: name of the stage.
            owner: module, or class in a module, with the function.
            function: name of the function there.
        """
        module, _, kind = owner.rpartition(".")
        place: Any = (
            getattr(importlib.import_module(module), kind)
            if kind[0].isupper()
            else importlib.import_module(owner)
        )
        original: Callable[..., Any] = getattr(place, function)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return original(*args, **kwargs)

        setattr(place, function, watched)


def _take_peak_mb() -> float:
    """Peak resident memory since the last call, in 10^6 bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e6


def measure(case: str, verified: bool, cache: Path | None) -> Row:
    """Export a case in this process, with a cache in a folder if one is given."""
    from export.adapters_lora.lora import Lora
    from export.bundles import model_source, writer
    from export.bundles.tier_table import TiersConfig, TierTable
    from export.cutting.split_model import ClientSegment
    from export.lowering.export_cache import ExportCache

    stages = Stages()
    for name, functions in STAGES.items():
        for owner, function in functions:
            stages.watch(name, owner, function)
    config, cut, rank = CASES[case]
    began = time.perf_counter()
    entries = None if cache is None else ExportCache(cache)
    before = set() if entries is None else set(entries.folder.glob("*"))
    row = Row(case, verified, _commit())
    with tempfile.TemporaryDirectory(dir=".") as folder:
        source = Path(folder) / "config.json"
        source.write_text(json.dumps(config))
        tiers = TiersConfig({"phone": TierTable(cut)}, graphs=["backward"])
        model = model_source.build_model(str(source), None if rank is None else Lora(rank=rank))
        example, classes = tiers.example(model)
        writer.export_bundles(
            model,
            tiers.exported(model, dict),
            Path(folder) / "bundles",
            example=example,
            classes=classes,
            verified=verified,
            cache=entries,
            progress=lambda line: print(f"{time.perf_counter() - began:.0f} s: {line}", flush=True),
        )
        row.model_mb = sum(t.nbytes for t in model.tensors().values()) / 1e6
        row.segment_mb = sum(p.nbytes for p in ClientSegment(model, cut).parameters()) / 1e6
    stages.settle()
    row.cached = bool(before) and entries is not None and before == set(entries.folder.glob("*"))
    row.seconds = {"all": time.perf_counter() - began, **stages.seconds}
    row.cpu_s = {"all": sum(stages.cpu_s.values()), **stages.cpu_s}
    row.peak_mb = {"all": max(stages.peak_mb.values()), **stages.peak_mb}
    return row


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def table(rows: list[Row]) -> Table:
    """A table of seconds and peak memory, with a row for each stage of each case."""
    cells = []
    for row in rows:
        beyond = (row.peak_mb["all"] - row.model_mb) / row.segment_mb
        for stage in [*(s for s in (*STAGES, "rest") if s in row.seconds), "all"]:
            figures = (row.seconds[stage], row.cpu_s[stage])
            note = f"model + {beyond:.1f} segments" if stage == "all" else ""
            peak = f"{row.peak_mb[stage]:,.0f}"
            cells.append([row.case, stage, *(f"{n:.1f}" for n in figures), peak, note])
    return Table(
        "Seconds and peak memory of an export, by stage",
        ["case", "stage", "seconds", "CPU s", "peak MB", "that is"],
        cells,
        left=2,
    )


def main(
    case: Annotated[list[str], typer.Option(help="Cases to run; all if not given.")] = [],  # noqa: B006
    verify: Annotated[bool, typer.Option(help="Compare the graphs with eager PyTorch.")] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of a cache of exports; without one nothing is kept.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to add the rows to.")
    ] = None,
    alone: Annotated[
        Path | None, typer.Option(hidden=True, help="Run one case here, write its row to FILE.")
    ] = None,
) -> None:
    """Measure every case in a process of its own."""
    if alone is not None:
        alone.write_text(json.dumps(asdict(measure(case[0], verify, cache))))
        return
    rows = []
    for name in case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "row.json"
            command = [sys.executable, "-m", "benchmarks.export_cost", "--case", name]
            command += ["--verify" if verify else "--no-verify", "--alone", str(answer)]
            command += [] if cache is None else ["--cache", str(cache)]
            subprocess.run(command, check=True)
            rows.append(Row(**json.loads(answer.read_text())))
    Console(highlight=False).print(table(rows).rich())
    if json_file is not None:
        earlier = json.loads(json_file.read_text()) if json_file.exists() else []
        write_rows(json_file, [*earlier, *map(asdict, rows)])


if __name__ == "__main__":
    typer.run(main)
