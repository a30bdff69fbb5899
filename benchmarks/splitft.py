"""SplitFT: cuts that adapt against cuts that stay, on five simulated devices that are not alike.

    python -m benchmarks.splitft --pretrain FILE --train FILE --test FILE
        [--work runs/splitft] [--jobs 2] [--json FILE] [--docs FOLDER]

A small GPT-2 for bytes is trained on one text (``--pretrain``, once, kept in the work folder) and
adapted to another (``--train``) with LoRA; its perplexity is measured on a third (``--test``).
The job is ``splitft.toml`` beside this file. What is finished in the work folder, which is for
one set of texts, is not run again; a run that was interrupted goes on. ``--docs docs`` also writes
tables, verdicts and a picture into ``docs/results.md``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import gpt2
from benchmarks.cells import run_cells
from benchmarks.pages import put_between
from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError, CutlayerError
from edge_sdk.inference.metrics import Tally
from edge_sdk.training.data import Examples
from server_hub.simulation.compare import Cell
from server_hub.simulation.datasets import DataTable, load_dataset
from server_hub.simulation.job import CutsTable, Job
from server_hub.simulation.partition import PartitionTable
from server_hub.simulation.results import Grid, figure, fleet_accuracy, partition_name
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import RoundRecord, read_records
from server_hub.trunk.evaluator import batches_to_evaluate

JOB = Path(__file__).with_name("splitft.toml")
PICTURE = "splitft.png"

ADAPTIVE, CENTRALIZED = "adaptive", "centralized"
FIXED = {"cut 2": 2, "cut 4": 4, "cut 6": 6}
START = "cut 2"
"""Where all devices are cut to begin with: what adapting is measured against."""
OPTIONS = [1, 2, 4, 6]
PARTITIONS = {"iid": PartitionTable("iid"), "length 0.1": PartitionTable("length", 0.1)}

CENTRALIZED_RATE = 0.003
MORE_ROUNDS = 1.5
"""Adaptive cuts go on for longer, for the perplexity that a fixed cut has reached: what is
compared there is time. The learning rate is constant, so what comes before is the same. All other
figures are those after the job's own number of rounds: of equal samples."""

HELD_OUT = 300
"""Texts of the test file that perplexity is measured on, always the same."""

TIME_TARGET, CENTRALIZED_TARGET = 0.70, 1.02


@dataclass(frozen=True)
class Setting:
    """What the cells of a line in the tables have in common.

    Attributes:
        policy: ``adaptive``, a key of :data:`FIXED`, or ``centralized``.
        partition: a key of :data:`PARTITIONS`.
        rank: of the adapters at a cut.
        clients: devices.
    """

    policy: str
    partition: str
    rank: int
    clients: int

    @property
    def group(self) -> tuple[str, int, int]:
        """What a policy is compared with others in."""
        return self.partition, self.rank, self.clients

    def cell(self, job: Job, seed: int, work: Path) -> Cell:
        """The job with this setting and seed, and its folder."""
        name = f"{self.policy}-{self.partition}-rank-{self.rank}-{self.clients}".replace(" ", "-")
        folder = work / name / f"seed-{seed}"
        if self.policy == CENTRALIZED:
            local = replace(job.local, hyper={"lr": CENTRALIZED_RATE})
            return Cell(replace(job, method="centralized", seed=seed, local=local), folder)
        times = self.clients // job.clients
        cuts, rounds = CutsTable(rank=self.rank), job.rounds
        if self.policy == ADAPTIVE:
            cuts = CutsTable(policy="adaptive", options=OPTIONS, rank=self.rank)
            rounds = replace(rounds, count=round(MORE_ROUNDS * rounds.count))
        tiers = {
            tier: replace(t, clients=times * t.clients, cut=FIXED.get(self.policy, t.cut))
            for tier, t in job.tiers.items()
        }
        here = PARTITIONS[self.partition]
        return Cell(
            replace(job, tiers=tiers, cuts=cuts, rounds=rounds, partition=here, seed=seed), folder
        )


SETTINGS = [
    *(Setting(p, part, 8, 5) for part in PARTITIONS for p in (ADAPTIVE, *FIXED)),
    *(Setting(p, part, 16, 5) for part in PARTITIONS for p in (ADAPTIVE, START)),
    *(Setting(p, "iid", 8, 20) for p in (ADAPTIVE, START)),
    Setting(CENTRALIZED, "iid", 16, 5),
]


@dataclass(frozen=True)
class Run:
    """A cell that is at its end.

    Attributes:
        setting: its setting.
        job: its job.
        equal: rounds that figures of equal samples are taken after.
        records: its rounds.
    """

    setting: Setting
    job: Job
    equal: int
    records: Sequence[RoundRecord]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Virtual seconds and perplexity, after each round."""
        return [(r.clock, fleet_accuracy(self.job, r.accuracy, "perplexity")) for r in self.records]

    @property
    def best(self) -> tuple[float, float]:
        """Seconds and perplexity where that is lowest, at equal samples at most."""
        return min(self.curve[: self.equal], key=lambda point: point[1])

    @property
    def end(self) -> RoundRecord:
        """The last round of equal samples."""
        return self.records[self.equal - 1]

    @property
    def moves(self) -> int:
        """Devices that went on with another cut."""
        return sum(len(r.moves) for r in self.records[: self.equal])

    @property
    def hub_busy(self) -> float:
        """Share of the time that the hub computes."""
        assert self.job.hub_gflops is not None
        return self.end.costs["trunk_flop"] / (1e9 * self.job.hub_gflops) / self.end.clock

    def seconds_to(self, perplexity: float) -> float | None:
        """When it is as low; None if it never is."""
        return next((s for s, value in self.curve if value <= perplexity), None)

    def megabytes(self, *kinds: str) -> float:
        """Traffic of these kinds of messages up and down; of all without any."""
        return sum(
            sum(ways.values()) for kind, ways in self.end.bytes.items()
            if kind in kinds or not kinds
        ) / 1e6  # fmt: skip

    def row(self, before: float) -> dict[str, object]:
        """For the file."""
        return {
            "policy": self.setting.policy,
            "partition": partition_name(self.job),
            "cut_rank": self.setting.rank,
            "clients": self.setting.clients,
            "seed": self.job.seed,
            "before": before,
            "curve": self.curve,
            "best": self.best[1],
            "sim_seconds": self.end.clock,
            "bytes": self.end.bytes,
            "moves": self.moves,
            "cuts": self.end.cuts,
            "hub_busy": self.hub_busy,
            "samples": self.equal * (self.job.data.train or 0),
        }


Runs = dict[tuple[Setting, int], Run]
"""By setting and seed."""


def main(
    pretrain: Annotated[Path, typer.Option(help="Text that the base is trained on.")],
    train: Annotated[Path, typer.Option(help="Text that the fleet adapts it to.")],
    test: Annotated[Path, typer.Option(help="Text that perplexity is measured on.")],
    work: Annotated[Path, typer.Option(help="Folder of base and runs.")] = Path("runs/splitft"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, of a thread each.")] = 2,
    finished: Annotated[
        bool, typer.Option("--finished", help="Run nothing; show what is finished so far.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Write into results.md here, and a picture.")
    ] = None,
) -> None:
    """Run the benchmark, or what is left of it."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    job = Job.read(JOB)
    job = replace(job, data=replace(job.data, source=str(train.absolute())))
    base = work.absolute() / "base"
    if not base.exists():
        if finished:
            raise ConfigError(f"{work} holds no base: nothing has run there")
        with console.status("training the base"):
            gpt2.pretrain(pretrain, base)
    os.environ[gpt2.BASE] = str(base)  # for the processes that are started from here, too
    texts = DataTable(str(test), held_out=job.data.held_out, train=HELD_OUT, length=gpt2.LENGTH)
    held_out = load_dataset(texts).train
    cells = {(s, seed): s.cell(job, seed, work) for seed in range(seeds) for s in SETTINGS}
    if not finished:
        todo = [cell for cell in cells.values() if not cell.finished("torch")]
        runs_left = [partial(run_cell, cell, held_out) for cell in todo]
        run_cells(console, list(cells.values()), runs_left, jobs)
    runs = {
        (setting, seed): Run(setting, cell.job, job.rounds.count, read_records(cell.folder))
        for (setting, seed), cell in cells.items()
        if cell.finished("torch")
    }
    if not runs:
        raise ConfigError("nothing is finished")
    before = perplexity_before(held_out)
    tables = [perplexity_grid(runs), cost_grid(runs)]
    for table in tables:
        console.print(table.rich())
    verdicts = [time_verdict(runs), centralized_verdict(runs)]
    for verdict in verdicts:
        console.print(verdict)
    if json_file is not None:
        lines = ",\n".join(json.dumps(run.row(before)) for run in runs.values())
        write_atomically(json_file.absolute(), f"[\n{lines}\n]\n".encode())
    if docs is not None:
        draw(runs, docs / PICTURE)
        picture = f"![perplexity over simulated time]({PICTURE})"
        parts = [
            setting_text(job, before, seeds), *(t.markdown().replace("## ", "### ", 1)
            for t in tables), "\n".join(f"- {verdict}" for verdict in verdicts), picture,
        ]  # fmt: skip
        put_between(docs / "results.md", "splitft", "\n\n".join(parts))


# --- running --------------------------------------------------------------------------------------


def run_cell(cell: Cell, held_out: Examples) -> None:
    """Run a cell, or what is left of it, measured on other texts than those of its source."""
    with Simulation(cell.job, cell.folder) as simulation:
        simulation.data = replace(simulation.data, held_out=held_out)
        simulation.run()


@torch.no_grad()
def perplexity_before(held_out: Examples) -> float:
    """Of the base, uncut."""
    model, tally = gpt2.build().eval(), Tally("tokens")
    for batch in batches_to_evaluate(held_out, model):
        logits = model(torch.from_numpy(batch.x)).double()
        tally.add(logits[None], torch.from_numpy(batch.y))
    return tally.value


# --- tables ---------------------------------------------------------------------------------------


def spread(values: Sequence[float], shown: Callable[[float], str] = figure) -> str:
    """Mean, and standard deviation where there are several."""
    deviation = f" ± {shown(stdev(values))}" if len(values) > 1 else ""
    return shown(fmean(values)) + deviation


def lines(runs: Runs) -> dict[Setting, list[Run]]:
    """The runs of each setting, seed by seed, in the order of :data:`SETTINGS`."""
    found = {s: [run for (setting, _), run in runs.items() if setting == s] for s in SETTINGS}
    return {setting: cells for setting, cells in found.items() if cells}


def name_of(setting: Setting) -> list[str]:
    """The first columns of a table."""
    if setting.policy == CENTRALIZED:
        return [setting.policy, "", str(setting.rank), ""]
    return [setting.policy, setting.partition, str(setting.rank), str(setting.clients)]


NAMES = ["policy", "partition", "cut rank", "clients"]


def times_to_fixed(runs: Runs, setting: Setting) -> list[tuple[float | None, float]]:
    """Seconds to the fixed cut's best perplexity, and the fixed cut's own, by pairs of a seed."""
    fixed = replace(setting, policy=START)
    pairs = [
        (run, runs[fixed, seed]) for (s, seed), run in runs.items()
        if s == setting and (fixed, seed) in runs
    ]  # fmt: skip
    return [(run.seconds_to(other.best[1]), other.best[0]) for run, other in pairs]


def perplexity_grid(runs: Runs) -> Grid:
    """A line per setting: perplexity, time, and time until what the fixed cut has reached."""
    rows = []
    for setting, cells in lines(runs).items():
        best = spread([run.best[1] for run in cells], "{:.3f}".format)
        row = [*name_of(setting), str(len(cells)), best]
        if setting.policy == CENTRALIZED:
            rows.append([*row, "", "", "", ""])
            continue
        times = times_to_fixed(runs, setting)
        reached = [(mine, its) for mine, its in times if mine is not None]
        rows.append(
            [
                *row,
                spread([run.end.clock for run in cells]),
                spread([mine for mine, _ in reached]) if reached else "-",
                spread([mine / its for mine, its in reached], "{:.2f}".format) if reached else "-",
                f"{len(reached)} of {len(times)}",
            ]
        )
    header = [*NAMES, "seeds", "perplexity", "job, s", f"to {START}'s, s", "ratio", "reached"]
    title = (
        f"Lowest perplexity at equal samples, virtual seconds of the job and until the lowest "
        f"perplexity of {START}; mean ± standard deviation"
    )
    return Grid(title, header, rows, 2)


def cost_grid(runs: Runs) -> Grid:
    """A line per setting: traffic by kind, moves, and how busy the hub is."""
    rows = []
    for setting, cells in lines(runs).items():
        if setting.policy == CENTRALIZED:
            continue
        kinds = (("update", "blob"), ("activations",), ("gradient",), ())
        rows.append(
            [
                *name_of(setting),
                *(figure(fmean(run.megabytes(*kind) for run in cells)) for kind in kinds),
                figure(fmean(run.moves for run in cells)),
                f"{fmean(run.hub_busy for run in cells):.0%}",
            ]
        )
    header = [*NAMES, "adapters", "activations", "gradients", "all", "moves", "hub busy"]
    title = (
        "Traffic of all devices up and down in MB (adapters with their optimizer slots), moves to "
        "another cut, share of the time that the hub computes; means"
    )
    return Grid(title, header, rows, 2)


def time_verdict(runs: Runs) -> str:
    """Whether adapting reaches the fixed cut's best perplexity in as little time as is wanted."""
    found, met = [], 0
    for setting in lines(runs):
        times = times_to_fixed(runs, setting) if setting.policy == ADAPTIVE else []
        if not times:
            continue
        ratios = [mine / its for mine, its in times if mine is not None]
        if len(ratios) == len(times):
            met += fmean(ratios) <= TIME_TARGET
            found.append(f"{where(setting)}: {fmean(ratios):.0%}")
        else:
            found.append(f"{where(setting)}: reached with {len(ratios)} of {len(times)} seeds")
    return (
        f"Adaptive reaches the best perplexity of {START} in at most {TIME_TARGET:.0%} of its "
        f"simulated time: {answer(met, found)}"
    )


def centralized_verdict(runs: Runs) -> str:
    """Whether adapting comes as near to centralized training as is wanted."""
    groups = lines(runs)
    reference = [run.best[1] for s, cells in groups.items() for run in cells
                 if s.policy == CENTRALIZED]  # fmt: skip
    found, met = [], 0
    for setting, cells in groups.items():
        if setting.policy == ADAPTIVE and reference:
            ratio = fmean(run.best[1] for run in cells) / fmean(reference)
            met += ratio <= CENTRALIZED_TARGET
            found.append(f"{where(setting)}: {ratio - 1:+.1%}")
    return (
        f"Adaptive is within {CENTRALIZED_TARGET - 1:.0%} of centralized perplexity at equal "
        f"samples: {answer(met, found)}"
    )


def where(setting: Setting) -> str:
    """A setting without its policy, for sentences."""
    return f"{setting.partition}, rank {setting.rank}, {setting.clients} clients"


def answer(met: int, found: Sequence[str]) -> str:
    """Met or not, and what was found."""
    if not found:
        return "not measured yet."
    verdict = "met" if met == len(found) else f"met in {met} of {len(found)} settings"
    return f"**{verdict if met else 'not met'}** ({'; '.join(found)})."


# --- the page -------------------------------------------------------------------------------------


def setting_text(job: Job, before: float, seeds: int) -> str:
    """What all runs have in common, in Markdown."""
    tiers = "; ".join(
        f"{t.clients} {name} ({t.gflops:g} GFLOPS, {t.uplink_mbit:g} Mbit/s up, "
        f"{t.latency_ms:g} ms)"
        for name, t in job.tiers.items()
    )
    return (
        f"{job.clients} devices: {tiers}; a hub of {job.hub_gflops:g} GFLOPS. {job.data.train} "
        f"texts of up to {job.data.length} bytes, each once in a round, {job.rounds.count} "
        f"rounds, batches of {job.local.batch_size}, merged in the trunk up to "
        f"{job.trunk.max_rows} texts a step, staleness {job.local.staleness}. AdamW with a "
        f"constant rate: {job.local.hyper['lr']:g} on devices, {job.trunk.hyper['lr']:g} in the "
        f"trunk, {CENTRALIZED_RATE:g} for centralized training, chosen among a few on "
        f"another seed. GPT-2 with "
        f"{gpt2.DEPTH} blocks, {gpt2.WIDTH} wide, LoRA rank {gpt2.RANK}. Perplexity of a byte on "
        f"{HELD_OUT} held-out "
        f"texts, {before:.2f} before; {seeds} seeds. Adaptive runs go on for {MORE_ROUNDS:g} "
        "times as many rounds, which only the time to the fixed cut's perplexity and the picture "
        "look at. Times are virtual."
    )


COLOURS = {ADAPTIVE: "#d62728", "cut 2": "#1f77b4", "cut 4": "#17becf", "cut 6": "#7f7f7f"}


def draw(runs: Runs, path: Path) -> None:
    """Perplexity over virtual time: a panel per partition and fleet, a line per policy.

    A line is the mean over the seeds, in a band from the lowest to the highest. All are at the
    rank that most settings have.
    """
    from matplotlib.figure import Figure

    groups = lines(runs)
    panels = dict.fromkeys(s.group for s in groups if s.policy != CENTRALIZED and s.rank == 8)
    figure = Figure(figsize=(4.8 * len(panels), 4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0])
    reference = [run.best[1] for s, cells in groups.items() for run in cells
                 if s.policy == CENTRALIZED]  # fmt: skip
    for axis, group in zip(axes, panels, strict=True):
        for setting, cells in groups.items():
            if setting.group != group or setting.policy == CENTRALIZED:
                continue
            points = list(zip(*(run.curve for run in cells), strict=True))  # by round, of all seeds
            seconds = [fmean(s for s, _ in point) for point in points]
            values = [[value for _, value in point] for point in points]
            colour = COLOURS[setting.policy]
            axis.plot(seconds, [fmean(v) for v in values], color=colour, marker=".",
                      label=setting.policy)  # fmt: skip
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
        if reference:
            axis.axhline(fmean(reference), color="black", linestyle=":", linewidth=1,
                         label="centralized, equal samples")  # fmt: skip
        partition, _, clients = group
        axis.set(title=f"{partition}, {clients} devices", xlabel="virtual time (s)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="perplexity")
    axes[-1].legend(loc="upper right", title="policy")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write_atomically(path, picture.getvalue())


if __name__ == "__main__":
    try:
        typer.run(main)
    except CutlayerError as error:
        raise SystemExit(f"benchmarks.splitft: {error}") from error
