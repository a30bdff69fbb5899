"""Checks of the trunk on a GPU: exactness, speed, loss in bf16, and waits of the host.

    python -m benchmarks.gpu_check [--json FILE] [--markdown FILE]

It needs a checkout, Python, torch, numpy and msgpack; Cutlayer need not be installed. It takes less
than five minutes on an H100. On a machine without a GPU it runs tiny sizes on the CPU, as a test of
the script; its report says that this is no result.

Each check has figures and a verdict:
    exactness: two merged steps of random devices change the model as plain PyTorch does, which
        computes each device alone; so do steps of three base networks at once. Gradients of the
        merged pass equal those of the uncut model. Returned gradients are exact up to the loss of
        their packing. All are checked in float64, and with a wider bound in float32 without TF32.
    speed: samples (tokens of a text) per second of the trunk's step, divided by those of the bare
        loop on the same merged batches, in turns; the figure is the median of the ratios. The
        trunk starts with packed batches in the host's memory, the bare loop with the same bytes in
        pinned memory.
    loss in bf16: the loss after some steps, compared with that in float32 on the same data.
    host waits: how often the host waits for the GPU in a step, counted with torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu_exact import (
    merged_error,
    returned_error,
    rounding_error,
    uncut_error,
    vmapped_error,
)
from benchmarks.gpu_models import Shape, exact_products
from benchmarks.gpu_speed import losses, speed, waits

PINNED = "2.13"
"""The version of torch that Cutlayer is pinned to."""

MOST_WAITS = 2.0
"""Maximum number of host waits in a step: one to read the report of the step, and one to spare."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the checks.

    Attributes:
        exact: models of the exactness checks.
        seeds: number of cases of each model.
        fast: models of the checks of speed and host waits, with optimizer, rows of a device and
            number of devices.
        turns: number of turns of trunk and bare loop.
        steps: number of steps in a turn.
        loss: models of the check of the loss in bf16, with optimizer and rows of a device.
        loss_steps: number of steps of the check of the loss in bf16.
        devices: numbers of devices that host waits are counted with.
    """

    exact: tuple[Shape, ...]
    seeds: int
    fast: tuple[tuple[Shape, str, int, int], ...]
    turns: int
    steps: int
    loss: tuple[tuple[Shape, str, int], ...]
    loss_steps: int
    devices: tuple[int, ...]


_TINY_CONV = Shape("conv", 8, 8, 10, 16, (2, 4, 6))
_TINY_GPT2 = Shape("gpt2", 32, 4, 31, 12, (1, 2, 3))

FULL = Sizes(
    exact=(Shape("conv", 16, 8, 10, 32, (2, 4, 6)), Shape("gpt2", 64, 6, 97, 24, (1, 3, 5))),
    seeds=10,
    fast=(
        (Shape("conv", 64, 8, 10, 32, (2, 4, 6)), "sgd", 64, 16),
        (Shape("gpt2", 768, 12, 50257, 128, (2, 4, 8)), "adamw", 4, 16),
    ),
    turns=5,
    steps=10,
    loss=(
        (Shape("conv", 64, 8, 10, 32, (2, 4, 6)), "sgd", 16),
        (Shape("gpt2", 768, 12, 4096, 64, (2, 4, 8)), "adamw", 4),
    ),
    loss_steps=200,
    devices=(3, 12, 48),
)
TINY = Sizes(
    exact=(_TINY_CONV, _TINY_GPT2),
    seeds=1,
    fast=((_TINY_CONV, "sgd", 4, 3), (_TINY_GPT2, "adamw", 2, 3)),
    turns=1,
    steps=1,
    loss=((_TINY_CONV, "sgd", 4), (_TINY_GPT2, "adamw", 2)),
    loss_steps=4,
    devices=(3, 6),
)


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: name of the check.
        figure: the figure that decides the verdict.
        bound: the required value of the figure, as text.
        passed: whether the figure is within the bound; None if the machine cannot decide it.
        details: more figures.
    """

    name: str
    figure: float
    bound: str
    passed: bool | None
    details: dict[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``ok``, ``FAILED``, or ``no verdict``."""
        return "no verdict" if self.passed is None else "ok" if self.passed else "FAILED"


def exactness(sizes: Sizes, device: str) -> Iterator[Check]:
    """Check merged steps, base networks, gradients of the uncut model and returned gradients."""
    for shape in sizes.exact:
        for name, bound, error in _errors(shape, device):
            with exact_products():
                found = max(error(seed) for seed in range(sizes.seeds))
            details = {"cases": sizes.seeds}
            yield Check(
                f"{shape.name}: {name}", found, f"at most {bound:g}", found <= bound, details
            )


def _errors(shape: Shape, device: str) -> list[tuple[str, float, Callable[[int], float]]]:
    """Return name, bound, and error as a function of the seed, for each check of a model."""
    double, single = torch.float64, torch.float32
    return [
        ("merged steps, float64", 1e-10, lambda s: merged_error(shape, s, device, double)),
        ("merged steps, float32, by plain PyTorch's error", 2.0,
         lambda s: rounding_error(shape, s, device)),
        ("base networks, float64", 1e-10, lambda s: vmapped_error(shape, s, device, double)),
        ("base networks, float32", 1e-3, lambda s: vmapped_error(shape, s, device, single)),
        ("gradients of the uncut model, float64", 1e-10, lambda s: uncut_error(shape, s, device)),
        ("returned gradients, by their packing's loss", 1.000001,
         lambda s: returned_error(shape, s, device)),
    ]  # fmt: skip


def speeds(sizes: Sizes, device: str, on_gpu: bool) -> Iterator[Check]:
    """Compare the speed of the trunk's step with that of the bare loop."""
    for shape, optimizer, rows, devices in sizes.fast:
        for mode in ("fp32", "bf16"):
            found = speed(
                shape, device, mode, optimizer, devices, rows, sizes.steps, sizes.turns
            )  # fmt: skip
            ratio = statistics.median(found.ratios)
            unit = "tokens" if shape.texts else "samples"
            details = {
                f"{unit}_per_s": found.samples_per_s,
                f"bare_{unit}_per_s": found.bare_samples_per_s,
                "ratios": found.ratios,
                "devices": devices,
                "rows": rows * devices,
                "width": shape.width,
            }
            passed = ratio >= 0.9 if on_gpu else None
            name = f"{shape.name}: speed by the bare loop's, {mode}"
            yield Check(name, ratio, "at least 0.9", passed, details)


def bf16_losses(sizes: Sizes, device: str, on_gpu: bool) -> Iterator[Check]:
    """Compare the loss in bf16 with that in float32."""
    for shape, optimizer, rows in sizes.loss:
        found = losses(shape, device, optimizer, sizes.loss_steps, 6, rows)
        fall = found.first["fp32"] - found.last["fp32"]
        gap = abs(found.last["bf16"] - found.last["fp32"]) / abs(fall)
        details = {"steps": sizes.loss_steps, "first": found.first, "last": found.last}
        passed = gap <= 0.05 and fall > 0 if on_gpu else None
        name = f"{shape.name}: loss in bf16, difference to fp32 by fp32's fall"
        yield Check(name, gap, "at most 0.05", passed, details)


def host_waits(sizes: Sizes, device: str, on_gpu: bool) -> Iterator[Check]:
    """Count the host waits of a step; they must not grow with the number of devices."""
    for shape, optimizer, _, _ in sizes.fast:
        found = {n: waits(shape, device, optimizer, n, 1, sizes.steps) for n in sizes.devices}
        # aten::item is only a detail: AdamW reads its step counters, which are in the host's memory
        waited = {
            n: max(sum(counts[w] for w in counts if w.startswith("cuda")), counts["Memcpy DtoH"])
            for n, counts in found.items()
        }
        most = max(waited.values())
        passed = most <= MOST_WAITS and len(set(waited.values())) == 1 if on_gpu else None
        details = {f"{number} devices": counts for number, counts in found.items()}
        bound = f"at most {MOST_WAITS:g}, the same for {', '.join(map(str, waited))} devices"
        yield Check(f"{shape.name}: host waits in a step", most, bound, passed, details)


def environment(device: str) -> dict[str, str]:
    """Return the device, the versions of torch and CUDA, and notes on the machine."""
    on_gpu = device == "cuda"
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "notes": "",
    }
    notes = []
    if not on_gpu:
        notes.append("This machine has no GPU; tiny sizes on the CPU are no GPU result.")
    if not torch.__version__.startswith(f"{PINNED}."):
        notes.append(f"The check ran with torch {torch.__version__}, not with {PINNED}.")
    return found | {"notes": " ".join(notes)}


def markdown(where: dict[str, str], checks: list[Check]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        f"{where['device']}, torch {where['torch']}, CUDA {where['cuda']}. {where['notes']}",
        "",
        "| check | figure | must be | verdict |",
        "| --- | ---: | --- | --- |",
        *(f"| {c.name} | {c.figure:.3g} | {c.bound} | {c.verdict} |" for c in checks),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all checks; return 1 if one has failed."""
    parser = argparse.ArgumentParser(description="Check the trunk on a GPU.")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="JSON file to write all results to"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="Markdown file to write a table to"
    )
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device, sizes = ("cuda", FULL) if on_gpu else ("cpu", TINY)
    where, checks, began = environment(device), [], time.perf_counter()
    print(" ".join(f"{name} {value}" for name, value in where.items() if name != "notes"))
    if where["notes"]:
        print(where["notes"])
    for found in (
        exactness(sizes, device),
        host_waits(sizes, device, on_gpu),
        speeds(sizes, device, on_gpu),
        bf16_losses(sizes, device, on_gpu),
    ):
        for check in found:
            checks.append(check)
            seconds = time.perf_counter() - began
            print(f"{seconds:6.1f} s  {check.verdict:10}  {check.name}: {check.figure:.3g} "
                  f"({check.bound})  {check.details}", flush=True)  # fmt: skip
    if options.json is not None:
        body = {
            "environment": where,
            "checks": [asdict(c) | {"verdict": c.verdict} for c in checks],
        }
        options.json.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    if options.markdown is not None:
        options.markdown.write_text(markdown(where, checks), "utf-8")
    failed = [check.name for check in checks if check.passed is False]
    print(f"FAILED: {'; '.join(failed)}" if failed else "no check failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
