"""A device of the demo with texts that emulates a slower processor.

Seven processes share the machine, so the time that a step takes says little about a device. Each
device therefore emulates its speed: it measures the processor time of a step, and sleeps until the
step has taken a given multiple of that. Computation and traffic are the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.cli.device import peak_rss_mb
from edge_sdk.device import Device
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime, load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.transport.link import open_websocket


class SlowRuntime:
    """A runtime whose steps take ``slower`` times their processor time.

    Args:
        runtime: runs the graphs, in the thread that calls it.
        slower: factor, 1 or more.
    """

    def __init__(self, runtime: Runtime, slower: float) -> None:
        self._runtime, self._slower = runtime, slower

    @property
    def loading_s(self) -> float:
        """Seconds spent loading graphs; loading is not slowed down."""
        return self._runtime.loading_s

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        self._runtime.set_state(tensors)

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        return self._runtime.get_state(slots)

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        began, computed = time.perf_counter(), time.thread_time()
        loaded = self._runtime.loading_s
        outputs = self._runtime.run(graph, batch)
        if self._runtime.loading_s > loaded:  # loading and step cannot be told apart
            return outputs
        takes = self._slower * (time.thread_time() - computed)
        time.sleep(max(began + takes - time.perf_counter(), 0.0))
        return outputs


async def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    def load(bundle: Bundle, threads: int) -> Runtime:
        return SlowRuntime(load_runtime(bundle, threads), arguments.slower)

    device = Device(
        lambda: open_websocket(arguments.url),
        load,
        token=os.environ["CUTLAYER_TOKEN"],
        data=Examples.from_npz(arguments.data),
        cache=arguments.cache,
    )
    await device.join()
    async with device:
        training = await device.train()
        written = ""
        if arguments.prompt:
            prompt = np.frombuffer(arguments.prompt.encode(), np.uint8).astype(np.int64)
            tokens = await device.generate(
                prompt[None], arguments.tokens, temperature=0.5, context=arguments.context
            )
            written = bytes(tokens[0].astype(np.uint8)).decode("utf-8", "replace")
        return {
            "name": device.name,
            "cut": device.manifest.cut,
            "rounds": len(training.rounds),
            "stopped": training.reason,
            "written": written,
            "rss_mb": peak_rss_mb(),
            "torch_imported": "torch" in sys.modules,
        }


def main() -> None:
    """Take part in a job, continue a text, print a report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--slower", type=float, default=1.0)
    parser.add_argument("--prompt", default="", help="text to continue at the end")
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--context", type=int, help="positions that the model takes")
    print(json.dumps(asyncio.run(_run(parser.parse_args()))))


if __name__ == "__main__":
    main()
