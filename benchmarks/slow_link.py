"""How long an update and a download take on a slow link, also if the link breaks.

    python -m benchmarks.slow_link [--mb 20] [--json FILE]

A hub and a device are in this process, with a network between them that passes on so many bytes per
second, with a delay, and breaks the connection at regular times. The device sends an update whose
largest tensor is nearly all of it, and downloads the state that a round starts from.

Columns:
    needed: the bytes by the rate of the link, in seconds.
    taken: from the first byte that is sent until the hub has settled the update, or until the
        state is here.
    share: of the link's rate that was used.
    sent: bytes that the network passed on, by the bytes that were needed.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.trunk_hub import NullTrunk
from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.store import BlobStore
from edge_sdk.protocol.messages import Ready, Round
from edge_sdk.training.exchange import send_update
from edge_sdk.training.plan import LocalResult
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.link import open_websocket
from export.bundles.writer import Tier, make_steps, segment_of, write_tier
from export.cutting.split_model import WEIGHTS, SplitModel
from server_hub.config import HubConfig
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.reports.files import write_rows
from server_hub.reports.table import Table
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import Trunk
from tests.lib.harness import served
from tests.lib.proxy import Relay, relay

WIDTH = 32

DIRECTIONS = {"update": "up", "download": "down"}
"""What may be measured, and the direction in which its bytes go."""

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        what: ``update`` or ``download``.
        bytes_per_s: rate of the link in its direction.
        round_trip_s: round trip of the link, in seconds.
        breaks: number of times that the connection breaks meanwhile.
    """

    what: str
    bytes_per_s: float
    round_trip_s: float = 0.0
    breaks: int = 0


@dataclass(frozen=True)
class Result(Case):
    """The figures of a case; see the module."""

    bytes: int = 0
    needed_s: float = 0.0
    taken_s: float = 0.0
    share: float = 0.0
    sent: float = 0.0


CASES = (
    Case("update", 100e3),
    Case("update", 100e3, breaks=10),
    Case("update", 100e3, round_trip_s=0.1, breaks=10),
    Case("download", 1e6, round_trip_s=0.1),
    Case("download", 1e6, round_trip_s=0.1, breaks=3),
    Case("download", 10e6, round_trip_s=0.1),
)


class Wide(nn.Module):
    """A stem with one large matrix."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (rows, 32) of the inputs (rows, inputs)."""
        h: torch.Tensor = self.linear(x)
        return h


def write_bundle(folder: Path, size: int) -> SplitModel:
    """Write the bundle of a model whose stem has ``size`` bytes; its graphs are not exported."""
    inputs = size // (4 * WIDTH)
    blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    model = SplitModel(Wide(inputs), blocks, nn.Linear(WIDTH, 2))
    blobs, example = BlobStore(folder / "blobs"), torch.zeros(8, inputs)
    model.add_heads([1], example, 2)
    tier = Tier(1, "int8", runtime="torch")
    steps = make_steps(segment_of(model, tier), tier, example, 2, "sgd")
    manifest = write_tier(steps, "thin", tier, blobs, example, lambda line: None, verified=False)
    entry = TierEntry(1, "int8", blobs.write(manifest.to_bytes()))
    model.save(folder / WEIGHTS)
    BundleIndex(folder, None, 2, "sgd", {"thin": entry}, {}).write()
    return model


@asynccontextmanager
async def joined(
    folder: Path, model: SplitModel, case: Case, limits: Limits
) -> AsyncIterator[tuple[Connection, Relay, Manifest]]:
    """A hub in this process, and a device that is connected over the network of a case."""
    tokens = TokenFile(folder / "tokens.toml")
    token = tokens.issue("phone", "thin")
    config = HubConfig(
        bundles=folder / "bundles",
        tokens=tokens.path,
        run=Path(tempfile.mkdtemp(dir=folder)) / "run",
        listen=Listen(port=0),
        rounds=RoundRules(count=1, min_devices=1, deadline_s=3600),
        limits=limits,
        leave_s=0.1,
    )
    hub = Hub(config, model, cast(Trunk, NullTrunk()))
    rates = {DIRECTIONS[case.what]: case.bytes_per_s}
    async with (
        served(hub) as address,
        relay(address, **rates, latency=case.round_trip_s / 2) as network,
    ):
        connection = Connection(
            lambda: open_websocket(network.url), token=token, tier=None, patience_s=60
        )
        await connection.open()
        try:
            yield connection, network, hub.manifests["thin"]
        finally:
            await connection.close("done")


async def measure(folder: Path, model: SplitModel, case: Case, limits: Limits) -> Result:
    """Send an update, or download a state, over the network of a case."""
    async with joined(folder, model, case, limits) as (connection, network, manifest):
        state = {entry.spec.name: entry.zeros() for entry in manifest.state if entry.kind != "slot"}
        size = sum(tensor.nbytes for tensor in state.values())
        needed = size / case.bytes_per_s
        now = asyncio.get_running_loop().time

        async def update() -> None:
            result = LocalResult(state, 10, {"loss": 1.0})
            await send_update(session, number, result, connection.welcome.max_frame)
            while session.channel.unacked:
                await asyncio.sleep(0.005)

        async def download() -> None:
            name = manifest.initial_state
            got = bytearray()
            await connection.download(name, 0, got.extend, manifest.blobs[name])
            assert len(got) == manifest.blobs[name]

        if case.what == "update":
            await connection.send(Ready(samples=10))
            session, delivery = await connection.next_work()
            assert isinstance(delivery.message, Round)
            number = delivery.message.round
            session.settle(delivery.seq)
        direction = DIRECTIONS[case.what]
        began, before = now(), network.passed[direction]
        breaking = asyncio.create_task(_break(network, needed, case.breaks))
        await (update() if case.what == "update" else download())
        taken = now() - began
        breaking.cancel()
        passed = network.passed[direction] - before
        return Result(
            **asdict(case),
            bytes=size,
            needed_s=needed,
            taken_s=taken,
            share=needed / taken,
            sent=passed / size,
        )


async def _break(network: Relay, seconds: float, breaks: int) -> None:
    """Break the connection so many times, at regular intervals."""
    for _ in range(breaks):
        await asyncio.sleep(seconds / (breaks + 1))
        network.cut()


def run(mb: float, cases: tuple[Case, ...], limits: Limits = DEFAULT_LIMITS) -> list[Result]:
    """Measure some cases with ``mb`` MB each, with a hub that has these limits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_bundle(folder / "bundles", int(mb * 1e6))
        return [asyncio.run(measure(folder, model, case, limits)) for case in cases]


def table(results: list[Result]) -> Table:
    """The results as a table."""
    header = ("what", "MB", "kB/s", "round trip", "breaks", "needed", "taken", "share", "sent")
    rows = [
        (
            r.what,
            f"{r.bytes / 1e6:.1f}",
            f"{r.bytes_per_s / 1e3:.0f}",
            f"{1000 * r.round_trip_s:.0f} ms",
            str(r.breaks),
            f"{r.needed_s:.1f} s",
            f"{r.taken_s:.1f} s",
            f"{100 * r.share:.0f} %",
            f"{100 * r.sent:.1f} %",
        )
        for r in results
    ]
    return Table("Long messages on slow links", header, rows)


def main(
    mb: Annotated[float, typer.Option(help="Size of the update and of the state, in MB.")] = 20.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the figures, as JSON.")
    ] = None,
) -> None:
    """Measure long messages on slow links."""
    results = run(mb, CASES)
    Console(highlight=False).print(table(results).rich())
    if json_file is not None:
        write_rows(json_file, [asdict(result) for result in results])


if __name__ == "__main__":
    typer.run(main)
