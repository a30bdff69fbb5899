"""Samples per second of the trunk of a real hub, beside a bare PyTorch loop.

    python -m benchmarks.trunk [--model small] [--devices 12] [--mode fp32] [--device cpu]
                               [--pairs 5] [--json FILE]

What is compared: a hub in a process of its own, with its trunk in another, that serves rounds over
real websockets to devices which replay activations packed before (:mod:`benchmarks.replay`), and a
plain PyTorch loop (:mod:`benchmarks.bare_loop`) that takes the very same merged steps of the same
bytes, in a process of its own, with the same model, optimizer, precision and number of threads.
They take turns: some rounds of the hub, then the steps of these rounds in the loop, and so on.

The time of the hub is that of whole rounds: states out to the devices, trunk steps, updates in,
averages, the next state; and at the end of a turn the wait until the last model is on disk. No
evaluation is in it. The bare loop does steps only.

A second hub with a trunk that does nothing takes its turn, too: the same devices feed it as fast as
they and the gateway can. Unless that is far above the trunk's speed, the devices are the limit.

Columns:
    trunk, devices, mode: model, number of devices, precision.
    samples_per_s: rows, or tokens of a text, that the hub's trunk was trained on, by the time of
        whole rounds; the median of the turns.
    ratio_to_bare_loop: that, by the bare loop's; the median over pairs of neighbouring turns, with
        the smallest and the largest.
    step_ratio: the same for the time in trunk steps alone, as the hub sees them.
    cpu_ratio: processor time of the bare loop by that of the trunk's process, which takes states in
        and gives copies out besides its steps. Other work on the machine hardly disturbs it.
    round_overhead_s: time of a round minus that in its trunk steps; the median of the turns.
    p99_ms: of the times from a batch's send to its acknowledgement, over all turns.
    feed_samples_per_s: samples per second at the hub whose trunk does nothing.
    replay_cpu: processor time of the devices' process during the hub's turns, by their time;
        1.0 would be a busy core.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bare_process import run_steps
from benchmarks.replay import generate, read_devices
from benchmarks.trunk_hub import HubJob, Turn, serve
from benchmarks.trunk_workloads import NAMES, Workload, get_workload, prepare
from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import CutlayerError


@dataclass(frozen=True)
class Row:
    """A line of the table; see the module."""

    trunk: str
    device: str
    devices: int
    mode: str
    samples_per_s: float
    ratio_to_bare_loop: float
    ratio_range: tuple[float, float]
    step_ratio: float
    cpu_ratio: float
    round_overhead_s: float
    p99_ms: float
    feed_samples_per_s: float
    replay_cpu: float
    bare_samples_per_s: float
    rows_per_step: float
    pairs: int


class Child:
    """A process that answers over a pipe."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), name=name)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, command: Any) -> None:
        """Give a command."""
        self._pipe.send(command)

    def answer(self, others: tuple[Child, ...] = ()) -> Any:
        """Its answer; raises :class:`CutlayerError` if it, or one of the others, has ended."""
        while not self._pipe.poll(0.5):
            for child in (self, *others):
                if not child._process.is_alive():
                    raise CutlayerError(f"the process {child._process.name} has ended; see above")
        try:
            return self._pipe.recv()
        except EOFError:
            raise CutlayerError(f"the process {self._process.name} has ended; see above") from None

    def close(self) -> None:
        """Tell it to stop, and end it if it does not."""
        if self._process.is_alive():
            self.send("stop")
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass(frozen=True)
class Pair:
    """A turn of the hub, of the bare loop on the same steps, and of the hub without a trunk."""

    turn: Turn
    bare_s: float
    bare_cpu_s: float
    feed: Turn
    waits: list[float]
    replay_cpu_s: float


class Bench:
    """All processes of one workload, ready to take turns."""

    def __init__(
        self,
        workload: Workload,
        folder: Path,
        hub: Child,
        null: Child,
        bare: Child,
        replay: Child,
        url: str,
    ) -> None:
        self.workload, self.folder = workload, folder
        self.hub, self.null, self.bare, self.replay = hub, null, bare, replay
        self._url = url
        self._devices = len(read_devices(folder))

    def pair(self, rounds: int) -> Pair:
        """One turn of each."""
        self._mark()
        turn = self._rounds(self.hub, rounds)
        cpu, waits = self._mark()
        self.bare.send(turn.steps)
        seconds, bare_cpu = self.bare.answer()
        feed = self._rounds(self.null, rounds)
        return Pair(turn, seconds, bare_cpu, feed, waits[self._url], cpu)

    def _rounds(self, hub: Child, rounds: int) -> Turn:
        hub.send(rounds)
        turn: Turn = hub.answer((self.replay,))
        expected = self._devices * self.workload.rows * rounds
        if turn.rows != expected:
            raise CutlayerError(
                f"{turn.rows} rows came in {rounds} rounds, {expected} were sent; a device was "
                "dropped, so that the turn cannot be compared"
            )
        return turn

    def _mark(self) -> tuple[float, dict[str, list[float]]]:
        self.replay.send("mark")
        found: tuple[float, dict[str, list[float]]] = self.replay.answer()
        return found


@contextmanager
def bench(
    workload: Workload, devices: int, device: str, mode: str, threads: int
) -> Iterator[Bench]:
    """Prepare a workload and start its processes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cutlayer-trunk-")))
        prepare(workload, folder, devices)
        common = (workload.name, device, mode, threads)

        def start(name: str, target: Callable[..., None], *arguments: Any) -> Child:
            child = Child(name, target, *arguments)
            stack.callback(child.close)
            return child

        hub = start("hub", serve, HubJob(folder, folder / "run", *common))
        null = start("null hub", serve, HubJob(folder, folder / "null", *common, null=True))
        loop = start("bare loop", run_steps, folder, *common)
        urls = [hub.answer(), null.answer()]
        loop.answer()
        replay = start("devices", generate, folder, urls, read_devices(folder))
        yield Bench(workload, folder, hub, null, loop, replay, urls[0])


def measure(
    workload: Workload,
    devices: int,
    device: str,
    mode: str,
    pairs: int,
    threads: int,
    rounds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Row:
    """Measure one workload.

    Args:
        workload: the model and its traffic.
        devices: how many devices feed the hub.
        device: torch device of trunk and bare loop.
        mode: ``fp32`` or ``bf16``.
        pairs: turns of hub and bare loop.
        threads: torch threads of each.
        rounds: rounds in one turn.
        progress: told what is being done.

    Raises:
        CutlayerError: a process has ended, or a device was dropped.
    """
    progress("prepare")
    found = []
    with bench(workload, devices, device, mode, threads) as running:
        progress("warm-up")
        running.pair(1)
        for number in range(pairs):
            progress(f"pair {number + 1} of {pairs}")
            found.append(running.pair(rounds))
    samples = devices * workload.rows * rounds * workload.samples_per_row
    ratios = [p.bare_s / p.turn.seconds for p in found]
    median = statistics.median
    return Row(
        trunk=workload.name,
        device=device,
        devices=devices,
        mode=mode,
        samples_per_s=median(samples / p.turn.seconds for p in found),
        ratio_to_bare_loop=median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        step_ratio=median(p.bare_s / p.turn.calls["step"] for p in found),
        cpu_ratio=median(p.bare_cpu_s / p.turn.trunk_cpu_s for p in found),
        round_overhead_s=median((p.turn.seconds - p.turn.calls["step"]) / rounds for p in found),
        p99_ms=1000 * float(np.percentile([wait for p in found for wait in p.waits], 99)),
        feed_samples_per_s=median(samples / p.feed.seconds for p in found),
        replay_cpu=median(p.replay_cpu_s / p.turn.seconds for p in found),
        bare_samples_per_s=median(samples / p.bare_s for p in found),
        rows_per_step=median(p.turn.rows / len(p.turn.steps) for p in found),
        pairs=pairs,
    )


def table_of(rows: list[Row]) -> Table:
    """The rows for people."""
    table = Table(title="the trunk beside a bare PyTorch loop")
    for column in (
        "trunk", "devices", "mode", "samples/s", "bare loop", "ratio", "range", "in steps", "CPU",
        "round overhead, s", "p99, ms", "feed, samples/s", "replay CPU",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("trunk", "mode") else "right")
    for r in rows:
        low, high = r.ratio_range
        table.add_row(
            r.trunk, str(r.devices), r.mode, f"{r.samples_per_s:.0f}",
            f"{r.bare_samples_per_s:.0f}", f"{r.ratio_to_bare_loop:.2f}", f"{low:.2f}-{high:.2f}",
            f"{r.step_ratio:.2f}", f"{r.cpu_ratio:.2f}", f"{r.round_overhead_s:.3f}",
            f"{r.p99_ms:.0f}", f"{r.feed_samples_per_s:.0f}", f"{r.replay_cpu:.0%}",
        )  # fmt: skip
    return table


def main(
    model: Annotated[list[str], typer.Option(help=f"One of {', '.join(NAMES)}; repeat it.")] = [  # noqa: B006
        "small"
    ],
    devices: Annotated[list[int], typer.Option(help="Number of devices; repeat it.")] = [12],  # noqa: B006
    device: Annotated[str, typer.Option(help="Torch device: cpu or cuda.")] = "cpu",
    mode: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    pairs: Annotated[int, typer.Option(min=1, help="Turns of hub and bare loop.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds of a turn; 0 for the model's own.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads of trunk and bare loop.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure, print the table, and write it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # the table has many columns
    rows = []
    for name in model:
        workload = get_workload(name, device)
        for count in devices:
            with console.status(f"{name}, {count} devices") as status:
                rows.append(
                    measure(
                        workload, count, device, mode, pairs, threads, rounds or workload.rounds,
                        lambda line, at=f"{name}, {count} devices": status.update(f"{at}: {line}"),
                    )
                )  # fmt: skip
    console.print(table_of(rows))
    if json_file is not None:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        write_atomically(json_file.absolute(), f"[\n{lines}\n]\n".encode())


if __name__ == "__main__":
    typer.run(main)
