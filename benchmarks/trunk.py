"""Samples per second of the trunk of a real hub, compared with a bare PyTorch loop.

    python -m benchmarks.trunk [--model small] [--devices 12] [--mode fp32] [--device cpu]
                               [--pairs 5] [--json FILE]

The hub runs in one process and its trunk in another. The hub serves rounds over real WebSockets to
devices that replay activations packed beforehand (:mod:`benchmarks.replay`). The bare PyTorch loop
(:mod:`benchmarks.bare_loop`) runs in a third process. It takes the same merged steps of the same
bytes, with the same model, optimizer, precision and number of threads. The two take turns: some
rounds of the hub, then the steps of these rounds in the loop, and so on.

The time of the hub is that of whole rounds: sending states to the devices, trunk steps, receiving
updates, averaging, and the next state. At the end of a turn it includes the wait until the last
model is on disk. It includes no evaluation. The bare loop only runs steps.

A second hub, whose trunk does nothing, also takes turns: the same devices feed it as fast as they
and the gateway can. Unless its speed is far above the trunk's speed, the devices are the limit.

Columns:
    trunk, devices, mode: model, number of devices, precision.
    samples_per_s: rows, or tokens of texts, that the hub's trunk was trained on, per second of
        whole rounds; the median of the turns.
    ratio_to_bare_loop: samples_per_s divided by that of the bare loop; the median over pairs of
        neighbouring turns, with the smallest and the largest ratio.
    step_ratio: the same ratio for the time in trunk steps alone, as the hub measures it.
    cpu_ratio: processor time of the bare loop divided by that of the trunk's process, which also
        receives states and returns copies. Other work on the machine hardly affects it.
    round_overhead_s: time of a round minus the time in its trunk steps; the median of the turns.
    p99_ms: 99th percentile of the time from the send of a batch to its acknowledgement, over all
        turns.
    feed_samples_per_s: samples per second of the hub whose trunk does nothing.
    replay_cpu: processor time of the devices' process during the hub's turns, divided by the time
        of the turns; 1.0 is one busy core.
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
    """A line of the table; the docstring of the module describes the columns."""

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
        """Send a command to the process."""
        self._pipe.send(command)

    def answer(self, others: tuple[Child, ...] = ()) -> Any:
        """Return the answer of the process.

        Raises:
            CutlayerError: this process, or one of ``others``, has ended.
        """
        while not self._pipe.poll(0.5):
            for child in (self, *others):
                if not child._process.is_alive():
                    raise CutlayerError(f"the process {child._process.name} has ended; see above")
        try:
            return self._pipe.recv()
        except EOFError:
            raise CutlayerError(f"the process {self._process.name} has ended; see above") from None

    def close(self) -> None:
        """Stop the process; terminate it if it does not stop."""
        if self._process.is_alive():
            self.send("stop")
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass(frozen=True)
class Pair:
    """A turn of the hub, of the bare loop on the same steps, and of the hub with a null trunk."""

    turn: Turn
    bare_s: float
    bare_cpu_s: float
    feed: Turn
    waits: list[float]
    replay_cpu_s: float


class Bench:
    """The processes of one workload, ready to take turns."""

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
        """Run one turn of each."""
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
                f"the hub received {turn.rows} rows in {rounds} rounds, but {expected} were sent; "
                "a device was dropped, so the turn cannot be compared"
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
        devices: number of devices that feed the hub.
        device: torch device of trunk and bare loop.
        mode: precision, ``fp32`` or ``bf16``.
        pairs: number of turns of hub and bare loop.
        threads: number of torch threads of trunk and bare loop.
        rounds: number of rounds in one turn.
        progress: called with a line of text for each step of the measurement.

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
    """Return the rows as a table for the console."""
    table = Table(title="the trunk compared with a bare PyTorch loop")
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
    model: Annotated[list[str], typer.Option(help=f"One of {', '.join(NAMES)}; repeatable.")] = [  # noqa: B006
        "small"
    ],
    devices: Annotated[list[int], typer.Option(help="Number of devices; repeatable.")] = [12],  # noqa: B006
    device: Annotated[str, typer.Option(help="Torch device: cpu or cuda.")] = "cpu",
    mode: Annotated[str, typer.Option(help="Precision: fp32 or bf16.")] = "fp32",
    pairs: Annotated[int, typer.Option(min=1, help="Number of turns of hub and bare loop.")] = 5,
    rounds: Annotated[
        int, typer.Option(help="Number of rounds of a turn; 0 for that of the model.")
    ] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads of trunk and bare loop.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
) -> None:
    """Measure the workloads, print the table, and write the rows."""
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
