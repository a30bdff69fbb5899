"""The trunk on a GPU: exact, as fast as a bare PyTorch loop, and without waiting for the host.

    python -m benchmarks.gpu_check [--json FILE] [--markdown FILE]

It needs a checkout, Python, torch, numpy and msgpack; nothing has to be installed. It takes less
than five minutes on an H100. On a machine without a GPU it runs with tiny sizes on the CPU, to see
that it works; it says that this is no result.

What is checked, each with figures and a verdict:
    exactness: two merged steps of random devices change the model as plain PyTorch does that takes
        each device alone; the same for three base networks at once; gradients of the merged pass
        are those of the uncut model; gradients that go back to devices are right up to what their
        packing loses. In float64, and with a wider bound in float32 without TF32.
    speed: samples (tokens of a text) per second of the trunk's step, by that of the bare loop on
        the same merged batches, in turns; the median of the ratios. The trunk starts with packed
        batches in the host's memory, the bare loop with the same bytes in pinned memory.
    loss in bf16: after some steps on the same data, beside float32.
    host waits: how often in a step the host waits for the GPU, counted with torch's profiler.
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
"""The torch that Cutlayer is pinned to."""

MOST_WAITS = 2.0
"""Waits of the host in a step: one for what it reads of the step, one to spare."""


@dataclass(frozen=True)
class Sizes:
    """How large the checks are.

    Attributes:
        exact: models of the exactness checks.
        seeds: cases of each.
        fast: models of the other checks, with optimizer, rows of a device and devices.
        turns: turns of trunk and bare loop.
        steps: steps in a turn.
        loss: models of the loss in bf16, with optimizer and rows of a device.
        loss_steps: steps there.
        devices: numbers of devices to count host waits with.
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
    """What was found.

    Attributes:
        name: what was checked.
        figure: the figure that the verdict is on.
        bound: what it must be.
        passed: whether it is; None where the machine cannot say.
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
    """Merged steps, base networks, uncut gradients and returned gradients."""
    for shape in sizes.exact:
        for name, bound, error in _errors(shape, device):
            with exact_products():
                found = max(error(seed) for seed in range(sizes.seeds))
            details = {"cases": sizes.seeds}
            yield Check(
                f"{shape.name}: {name}", found, f"at most {bound:g}", found <= bound, details
            )


def _errors(shape: Shape, device: str) -> list[tuple[str, float, Callable[[int], float]]]:
    """Name, bound, and the error of a seed."""
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
    """The trunk's step beside the bare loop's."""
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
    """The loss in bf16 beside float32."""
    for shape, optimizer, rows in sizes.loss:
        found = losses(shape, device, optimizer, sizes.loss_steps, 6, rows)
        fall = found.first["fp32"] - found.last["fp32"]
        gap = abs(found.last["bf16"] - found.last["fp32"]) / abs(fall)
        details = {"steps": sizes.loss_steps, "first": found.first, "last": found.last}
        passed = gap <= 0.05 and fall > 0 if on_gpu else None
        name = f"{shape.name}: loss in bf16, difference to fp32 by fp32's fall"
        yield Check(name, gap, "at most 0.05", passed, details)


def host_waits(sizes: Sizes, device: str, on_gpu: bool) -> Iterator[Check]:
    """Host waits per step, which must not grow with the number of devices."""
    for shape, optimizer, _, _ in sizes.fast:
        found = {n: waits(shape, device, optimizer, n, 1, sizes.steps) for n in sizes.devices}
        # aten::item is a detail: AdamW reads its step counters, which are in the host's memory
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
    """Versions, and where this ran."""
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
        notes.append("There is no GPU here: tiny sizes on the CPU, which are no GPU result.")
    if not torch.__version__.startswith(f"{PINNED}."):
        notes.append(f"It ran with torch {torch.__version__}; Cutlayer is pinned to {PINNED}.")
    return found | {"notes": " ".join(notes)}


def markdown(where: dict[str, str], checks: list[Check]) -> str:
    """What was found, as a table."""
    lines = [
        f"{where['device']}, torch {where['torch']}, CUDA {where['cuda']}. {where['notes']}",
        "",
        "| check | figure | must be | verdict |",
        "| --- | ---: | --- | --- |",
        *(f"| {c.name} | {c.figure:.3g} | {c.bound} | {c.verdict} |" for c in checks),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all checks; returns 1 if one has failed."""
    parser = argparse.ArgumentParser(description="Check the trunk on a GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table here")
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
    print(f"FAILED: {'; '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
