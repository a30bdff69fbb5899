"""Steps per second of a device that receives its gradients over a slow link.

    python -m benchmarks.latency [--round-trip-ms 50] [--repeats 3] [--json FILE]

The hub runs in a separate process, the device in this one. They use real WebSockets through a relay
that delays bytes by half a round trip. The device trains the first two blocks of a small GPT-2 with
SplitFT. The benchmark measures the device's steps per second, with and without the delay, for
several values of staleness. Settings take turns; a ratio is that of the medians.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from rich.console import Console

from edge_sdk.device import Device
from edge_sdk.training.data import Examples
from export.adapters_lora.lora import Lora, add_lora
from export.bundles.writer import Tier, export_bundles
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import SplitModel
from server_hub.demo.processes import hub_process
from server_hub.gateway.tokens import TokenFile
from server_hub.reports.files import write_rows
from server_hub.reports.table import Table

WIDTH, DEPTH, WORDS, LENGTH, CUT = 256, 6, 256, 64, 2
BATCH, TEXTS, EPOCHS, ROUNDS = 8, 64, 4, 3
STEPS = EPOCHS * TEXTS // BATCH
"""Number of steps in a round. The first round, which loads the graphs, is not counted."""

STALENESS = (0, 2)

HUB = {
    "model": "benchmarks.latency:build",
    "method": {"name": "splitft"},
    "rounds": {"count": ROUNDS},
    "trunk": {"optimizer": "adamw", "threads": 1, "max_rows": 1},
}
"""Settings of the hub in every run."""


@dataclass(frozen=True)
class Row:
    """Steps per second in a setting: the median of the repetitions, and each of them."""

    round_trip_ms: float
    staleness: int
    steps_per_s: float
    all: list[float]


def build() -> SplitModel:
    """Return a small GPT-2 with random weights and adapters."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=DEPTH, n_head=4, vocab_size=WORDS, n_positions=LENGTH,
        bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return add_lora(from_transformers(config), Lora(rank=8), "gpt2")


@asynccontextmanager
async def relay(port: int, delay_s: float) -> AsyncIterator[int]:
    """Open a relay to ``port``; it delays bytes by ``delay_s`` seconds and has no bandwidth limit.

    Yields:
        The port of the relay.
    """

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, data = await line.get()
                await asyncio.sleep(max(due - now(), 0))
                writer.write(data)
                if not data:
                    writer.close()
                    return
                await writer.drain()

        arriving = asyncio.create_task(arrive())
        while data := await reader.read(2**16):
            line.put_nowait((now() + delay_s, data))
        line.put_nowait((now() + delay_s, b""))
        await arriving

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        with suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def steps_per_second(folder: Path, round_trip_ms: float, staleness: int) -> float:
    """Run a job over a link with this round trip; return the device's steps per second."""
    run = Path(tempfile.mkdtemp(dir=folder))
    tokens = TokenFile(folder / "tokens.toml")
    token = tokens.issue(run.name, "device")
    rng = np.random.default_rng(0)
    x = rng.integers(WORDS, size=(TEXTS, LENGTH))
    settings = {
        **HUB,
        "bundles": folder / "bundles",
        "tokens": tokens.path,
        "run": run / "run",
        "local": {"batch_size": BATCH, "epochs": EPOCHS, "staleness": staleness},
    }
    with hub_process(run, settings) as hub:
        port = int(hub.address.rpartition(":")[2])
        async with relay(port, round_trip_ms / 2000) as through:
            device = await Device.connect(
                f"ws://127.0.0.1:{through}", token=token, data=Examples(x, x), cache=run / "cache"
            )
            async with device:
                report = await device.train()
        for _ in hub.events:  # until the hub ends
            pass
    seconds = [done.seconds for done in report.rounds[1:]]
    return STEPS * len(seconds) / sum(seconds)


def main(
    round_trip_ms: Annotated[float, typer.Option(help="Round trip of the slow link.")] = 50.0,
    repeats: Annotated[int, typer.Option(min=1, help="Number of runs of each setting.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
) -> None:
    """Measure steps per second without and with the delay, and show their ratio."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.status("export"):
            export_bundles(
                build(), {"device": Tier(CUT, graphs=["backward"])}, folder / "bundles",
                example=torch.randint(WORDS, (BATCH, LENGTH)), classes=WORDS, optimizer="adamw",
            )  # fmt: skip
        settings = [(ms, s) for s in STALENESS for ms in (0.0, round_trip_ms)]
        found: dict[tuple[float, int], list[float]] = {setting: [] for setting in settings}
        for repeat in range(repeats):
            for ms, staleness in settings:
                with console.status(f"{repeat + 1} of {repeats}: {ms:g} ms, staleness {staleness}"):
                    speed = asyncio.run(steps_per_second(folder, ms, staleness))
                found[ms, staleness].append(speed)
    rows = [Row(ms, s, statistics.median(v), v) for (ms, s), v in found.items()]
    header = ["staleness", "0 ms", f"{round_trip_ms:g} ms", "ratio"]
    cells = []
    for staleness in STALENESS:
        fast, slow = (statistics.median(found[ms, staleness]) for ms in (0.0, round_trip_ms))
        cells.append([str(staleness), f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.0%}"])
    title = f"Steps per second, width {WIDTH}, {CUT} of {DEPTH} blocks on the device"
    console.print(Table(title, header, cells, 0).rich())
    if json_file is not None:
        write_rows(json_file, [asdict(row) for row in rows])


if __name__ == "__main__":
    typer.run(main)
