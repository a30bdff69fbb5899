"""A hub as a process of its own, which says what the attack costs it.

    python -m tests.adversary.hub_process BUNDLES FOLDER ROUNDS

It prints its address. Every line that comes on its standard input is answered with a line of JSON:
resident memory in MB, the 99th percentile and the largest of the event loop's delays in ms since
the last answer, and the number of rounds that are done.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_sdk.bundle.index import BundleIndex
from export.cutting.split_model import WEIGHTS
from server_hub.gateway.limits import Limits
from server_hub.hub import Hub
from server_hub.rounds.rounds import RoundRules
from tests.lib.harness import examples, hub_config, save_npz
from tests.lib.models import build

TICK_S = 0.005


async def watch(delays: list[float]) -> None:
    """Note how late the event loop is, again and again."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + TICK_S
        await asyncio.sleep(TICK_S)
        delays.append(max(loop.time() - due, 0.0))


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def serve(bundles: str, folder: Path, rounds: int) -> None:
    """Serve until standard input ends."""
    index = BundleIndex.read(Path(bundles))
    config = hub_config(
        folder,
        index,
        rounds=RoundRules(count=rounds, min_devices=3, deadline_s=10.0),
        limits=Limits(session_s=2.0, hello_s=2.0),
        held_out=save_npz(folder / "held-out.npz", examples(256, seed=7)),
        keep_serving=True,
    )
    config = replace(config, trunk=replace(config.trunk, max_rows=64))
    model = build()
    model.load(config.bundles / WEIGHTS)
    hub = Hub(config, model)
    delays: list[float] = []
    serving = asyncio.create_task(hub.serve(lambda url: print(url, flush=True)))
    watching = asyncio.create_task(watch(delays))
    gc.freeze()
    while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        if serving.done():
            serving.result()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps is not the hub's
        answer = {
            "resident_mb": resident_mb(),
            "p99_ms": 1000 * float(np.percentile(delays or [0.0], 99)),
            "max_ms": 1000 * max(delays, default=0.0),
            "rounds": hub.rounds.completed,
        }
        delays.clear()
        print(json.dumps(answer), flush=True)
    for task in (serving, watching):
        task.cancel()
    await asyncio.gather(serving, watching, return_exceptions=True)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
