"""Helpers for end-to-end tests: a hub in this process or as a process, and devices."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.training.data import Examples
from edge_sdk.training.report import TrainReport
from export.cutting.split_model import WEIGHTS
from server_hub.config import HubConfig
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.methods.method import ALL_PATHS
from server_hub.methods.settings import LocalTraining
from server_hub.release_server import ReleaseServer
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.local import LocalTrunk
from server_hub.trunk.settings import TrunkTraining
from tests.lib.models import build


def examples(count: int, seed: int = 0, classes: int = 10) -> Examples:
    """Noisy images in which each class has its own bright pixels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    patterns = np.random.default_rng(99).random((classes, 1, 8, 8)) > 0.6
    x = patterns[y].astype(np.float32) + 0.1 * rng.standard_normal((count, 1, 8, 8))
    return Examples(x.astype(np.float32), y)


def save_npz(path: Path, data: Examples) -> Path:
    """Write examples as an ``.npz`` file."""
    np.savez(path, x=data.x, y=data.y)
    return path


def hub_config(folder: Path, bundles: BundleIndex, **changes: Any) -> HubConfig:
    """A configuration for tests: a free port, short waits, tokens in ``folder``."""
    tokens = TokenFile(folder / "tokens.toml")
    if not tokens.path.exists():
        tokens.issue("nobody")
    config = HubConfig(
        bundles=bundles.folder,
        tokens=tokens.path,
        run=folder / "run",
        listen=Listen(port=0),
        rounds=RoundRules(count=2, min_devices=1, deadline_s=60),
        local=LocalTraining(batch_size=8, hyper={"lr": 0.05}),
        trunk=TrunkTraining(device="cpu", max_rows=64, hyper={"lr": 0.05}, threads=1),
        limits=Limits(session_s=5.0, hello_s=2.0),
    )
    return replace(config, **changes)


async def start_hub(hub: Hub | ReleaseServer) -> tuple[asyncio.Task[None], str]:
    """Start a hub in a task; returns the task and the hub's address, or raises why it fails."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(hub.serve(ready.set_result))
    await asyncio.wait([ready, serving], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    return serving, await ready


@asynccontextmanager
async def served(hub: Hub | ReleaseServer) -> AsyncIterator[str]:
    """Run a hub in this process until the block ends; yields its address."""
    serving, url = await start_hub(hub)
    try:
        yield url
    finally:
        if serving.done():
            serving.result()  # the hub failed: that is the error to see
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def running_hub(config: HubConfig) -> AsyncIterator[tuple[Hub, str]]:
    """Run a hub and its trunk in this process; yields the hub and its address."""
    held_out = examples(64, seed=7)
    model = build()
    model.load(config.bundles / WEIGHTS)
    trunk = LocalTrunk(model, "cpu", (held_out.x, held_out.y))
    tiers = BundleIndex.read(config.bundles).tiers
    cuts = {name: (entry.cut, entry.codec) for name, entry in tiers.items()}
    hub = Hub(config, model, trunk, evaluate=lambda: trunk.evaluate(cuts, ALL_PATHS))
    async with served(hub) as url:
        yield hub, url


async def take_part(url: str, token: str, cache: Path | str, rows: int = 24) -> TrainReport:
    """Have a device of the tier ``small`` train until the job is finished; returns its report."""
    async with await Device.connect(
        url, token=token, tier="small", data=examples(rows), cache=cache
    ) as device:
        report = await device.train()
    assert report.reason == "the job is finished"
    return report


def cutlayer(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
    """A ``cutlayer`` command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "edge_sdk.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd or Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env},
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def next_event(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """The next JSON event called ``name`` that a hub prints."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == name:
            return event
    raise AssertionError(f"the hub ended without {name}: {finish(process)[2]}")
