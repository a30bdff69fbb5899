"""The device of the demo with mixtures that answers with each mixture of base networks in turn.

It joins a hub whose job is over, fetches one base network after the other, and prints a line of
JSON for each mixture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edge_sdk.cli.device import peak_rss_mb
from edge_sdk.device import Device
from edge_sdk.inference.policy import Condition, MixturePolicy
from edge_sdk.training.data import Examples

CALLS = 50
"""Answers to one example each; their median is the time of an answer."""

BATCH = 16
"""Examples that are answered at a time for accuracy; few, so that they do not dominate memory."""

CONDITIONS = {
    "a phone at 80 %": Condition(battery=0.8),
    "the same phone at 15 %": Condition(battery=0.15),
    "a camera in the rain": Condition(hostile=0.5),
    "a phone that is too hot": Condition(thermal="serious"),
}


async def _run(arguments: argparse.Namespace) -> None:
    device = await Device.connect(
        arguments.url, token=os.environ["CUTLAYER_TOKEN"], cache=arguments.cache
    )
    async with device:
        attacked = np.load(arguments.attacked)
        seconds = {}
        for bases in arguments.bases:
            for robustness in arguments.robustness:
                x, y = attacked["x"], attacked["y"]
                row: dict[str, Any] = {"bases": bases, "lambda": robustness}
                for name, inputs in (("clean", x), ("robust", attacked[f"{bases}/{robustness:g}"])):
                    row[f"{name}_accuracy"] = await _accuracy(
                        device, Examples(inputs, y), bases, robustness
                    )
                took = await _median_seconds(device, Examples(x, y), bases, robustness)
                seconds[bases] = took
                row |= {"latency_ms": round(1e3 * took, 3), "rss_mb": peak_rss_mb()}
                print(json.dumps(row))
        policy = MixturePolicy(seconds)
        choices = {name: asdict(policy.choose(now)) for name, now in CONDITIONS.items()}
        print(json.dumps({"choices": choices, "torch_imported": "torch" in sys.modules}))


async def _accuracy(device: Device, examples: Examples, bases: int, robustness: float) -> float:
    right = 0
    for batch in examples.batches(BATCH):
        answer = await device.predict(batch.x, confidence=0, bases=bases, robustness=robustness)
        right += int((answer.labels == batch.y).sum())
    return right / len(examples)


async def _median_seconds(
    device: Device, examples: Examples, bases: int, robustness: float
) -> float:
    """Seconds of an answer to one example."""
    seconds = []
    for row in range(CALLS):
        started = perf_counter()
        await device.predict(
            examples.x[row : row + 1], confidence=0, bases=bases, robustness=robustness
        )
        seconds.append(perf_counter() - started)
    return float(np.median(seconds))


def main() -> None:
    """Answer with each mixture, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument(
        "--attacked", type=Path, required=True, help=".npz with x, y, and x attacked per mixture"
    )
    parser.add_argument("--bases", type=int, nargs="+", required=True)
    parser.add_argument("--robustness", type=float, nargs="+", required=True)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
