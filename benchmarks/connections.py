"""What many connections cost a hub: memory, the time of a mass reconnect, the time of a hello.

    python -m benchmarks.connections [--devices 2000] [--tokens 10000] [--json FILE]

A hub runs in a process of its own, with a trunk that does nothing and a job that never begins. The
devices are connections of this process, all from one address. They say hello and ready, and are
silent then.

Rows:
    memory of an idle device: resident memory of the hub's process with all devices connected, minus
        that without, by the number of devices, in KiB.
    all reconnect at once: all connections are cut, and all devices come back at the same moment
        and resume their sessions; seconds until the last one is welcome, and until half of them
        are.
    hello: time from a device's hello to its welcome, one device after the other, while the token
        file has ``--tokens`` devices; median and 99th percentile, in ms.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing as mp
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.trunk_hub import NullTrunk
from benchmarks.trunk_workloads import get_workload, prepare
from edge_sdk.bundle.store import write_atomically
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import SUBPROTOCOL, VERSION, Hello, Ready, Welcome
from server_hub.config import HubConfig
from server_hub.gateway.limits import Listen
from server_hub.hub import Hub
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import Trunk

HELLOS = 300
"""Hellos that are timed one after the other."""


@dataclass(frozen=True)
class Result:
    """The figures; see the module."""

    devices: int
    tokens: int
    memory_kib: float
    back_half_s: float
    back_all_s: float
    hello_ms: float
    hello_p99_ms: float


def token_of(number: int) -> str:
    """The token of a device."""
    return hashlib.sha256(f"benchmark {number}".encode()).hexdigest()


def serve(pipe: Connection, folder: Path) -> None:
    """A process with a hub: sends its address; any message is answered with its memory in KiB."""
    asyncio.run(_serve(pipe, folder))


async def _serve(pipe: Connection, folder: Path) -> None:
    config = HubConfig(
        bundles=folder / "bundles",
        tokens=folder / "tokens.toml",
        run=folder / "run",
        listen=Listen(port=0),
        rounds=RoundRules(count=1, min_devices=10**6),
    )
    hub = Hub(config, get_workload("small", "cpu").model(), cast(Trunk, NullTrunk()))
    serving = asyncio.create_task(hub.serve(pipe.send))
    while await asyncio.get_running_loop().run_in_executor(None, pipe.recv) != "stop":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        pipe.send(pages * os.sysconf("SC_PAGE_SIZE") / 1024)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


class IdleDevice:
    """A device that is connected and does nothing."""

    def __init__(self, url: str, number: int) -> None:
        self._url, self._number = url, number
        self._session: str | None = None
        self._connection: ClientConnection | None = None

    async def join(self) -> float:
        """Connect, say hello, and ready if the session is new; returns the hello's seconds."""
        self._connection = await connect(
            self._url,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            open_timeout=60,
            ping_interval=None,
        )
        began = time.perf_counter()
        hello = Hello(VERSION, token_of(self._number), "cut-1", session=self._session)
        await self._connection.send(encode(hello, 0, 0))
        welcome = decode(await self._connection.recv()).message
        seconds = time.perf_counter() - began
        assert isinstance(welcome, Welcome), welcome
        if not welcome.resumed:
            await self._connection.send(encode(Ready(samples=1), 1, 0))
        self._session = welcome.session
        return seconds

    def cut(self) -> None:
        """Cut the connection."""
        assert self._connection is not None
        self._connection.transport.abort()


async def _join_all(devices: Sequence[IdleDevice]) -> list[float]:
    """Let all devices join at once; returns after how many seconds each is in, in order."""
    began = time.perf_counter()
    after: list[float] = []

    async def join(device: IdleDevice) -> None:
        while True:
            try:
                await device.join()
                break
            except (OSError, EOFError):
                await asyncio.sleep(0.5)
        after.append(time.perf_counter() - began)

    await asyncio.gather(*(join(device) for device in devices))
    return after


async def measure(url: str, pipe: Any, devices: int, tokens: int) -> Result:
    """Measure a hub that has just started.

    Args:
        url: its address.
        pipe: answers with the hub's memory.
        devices: number of devices.
        tokens: number of tokens that the hub knows.
    """
    single = IdleDevice(url, tokens - 1)
    times = []
    for _ in range(HELLOS):
        times.append(1000 * await single.join())
        single.cut()
    await asyncio.sleep(1)
    before = _memory(pipe)
    fleet = [IdleDevice(url, number) for number in range(devices)]
    for first in range(0, devices, 50):
        await _join_all(fleet[first : first + 50])
    await asyncio.sleep(1)
    memory = (_memory(pipe) - before) / devices
    for device in fleet:
        device.cut()
    after = await _join_all(fleet)
    for device in fleet:
        device.cut()
    return Result(
        devices, tokens, memory, after[devices // 2], after[-1],
        statistics.median(times), float(np.percentile(times, 99)),
    )  # fmt: skip


def _memory(pipe: Any) -> float:
    pipe.send("memory")
    found: float = pipe.recv()
    return found


def main(
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 2000,
    tokens: Annotated[int, typer.Option(help="Number of tokens in the file.")] = 10_000,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure, print the table, and write it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, devices + 256), hard), hard))
    with tempfile.TemporaryDirectory(prefix="cutlayer-connections-") as name:
        folder = Path(name)
        prepare(get_workload("small", "cpu"), folder, 1)
        lines = (
            f'device-{i} = "sha256:{hashlib.sha256(token_of(i).encode()).hexdigest()}"'
            for i in range(tokens)
        )
        (folder / "tokens.toml").write_text("\n".join(["[devices]", *lines, ""]))
        context = mp.get_context("spawn")
        pipe, theirs = context.Pipe()
        hub = context.Process(target=serve, args=(theirs, folder), daemon=True)
        hub.start()
        result = asyncio.run(measure(pipe.recv(), pipe, devices, tokens))
        pipe.send("stop")
        hub.join(10)
    table = Table(title=f"{devices} devices from one address, {tokens} tokens")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("memory of an idle device, KiB", f"{result.memory_kib:.1f}")
    table.add_row("all reconnect at once: half are back after, s", f"{result.back_half_s:.2f}")
    table.add_row("all reconnect at once: all are back after, s", f"{result.back_all_s:.2f}")
    table.add_row("hello to welcome, median, ms", f"{result.hello_ms:.2f}")
    table.add_row("hello to welcome, 99th percentile, ms", f"{result.hello_p99_ms:.2f}")
    Console(highlight=False).print(table)
    if json_file is not None:
        write_atomically(json_file.absolute(), f"{json.dumps(asdict(result))}\n".encode())


if __name__ == "__main__":
    typer.run(main)
