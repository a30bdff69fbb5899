"""Tables, verdicts and a picture of the runs of :mod:`benchmarks.splitft`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from server_hub.reports.files import save_figure, tidy
from server_hub.reports.table import Table
from server_hub.reports.values import spread, three_digits
from server_hub.simulation.job import CutsTable, Job
from server_hub.simulation.partition import PartitionTable
from server_hub.simulation.results import fleet_accuracy, partition_name
from server_hub.simulation.workers import Cell
from server_hub.storage.run_folder import RoundRecord

ADAPTIVE, CENTRALIZED = "adaptive", "centralized"
FIXED = {"cut 2": 2, "cut 4": 4, "cut 6": 6}
START = "cut 2"
"""The initial cut of all devices; adaptive cuts are compared with this fixed cut."""
OPTIONS = [1, 2, 4, 6]
PARTITIONS = {"iid": PartitionTable("iid"), "length 0.1": PartitionTable("length", 0.1)}

CENTRALIZED_RATE = 0.003
MORE_ROUNDS = 1.5
"""Rounds of adaptive runs, as a multiple of the job's rounds. The additional rounds are for the
time to the perplexity of the fixed cut. The learning rate is constant, so they do not change the
rounds before. All other figures are those after the job's own number of rounds, at equal samples.
"""

HELD_OUT = 300
"""Number of texts of the test file that perplexity is measured on; they are always the same."""


@dataclass(frozen=True)
class Setting:
    """The values that the cells of a table line share.

    Attributes:
        policy: ``adaptive``, a key of :data:`FIXED`, or ``centralized``.
        partition: a key of :data:`PARTITIONS`.
        rank: rank of the adapters at a cut.
        clients: number of devices.
    """

    policy: str
    partition: str
    rank: int
    clients: int

    @property
    def group(self) -> tuple[str, int, int]:
        """The values that must be equal to compare policies."""
        return self.partition, self.rank, self.clients

    def cell(self, job: Job, seed: int, work: Path) -> Cell:
        """Return the cell of this setting with a seed."""
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
    """A finished cell.

    Attributes:
        setting: setting of the cell.
        job: job of the cell.
        equal: number of rounds after which figures at equal samples are taken.
        records: rounds of the cell.
    """

    setting: Setting
    job: Job
    equal: int
    records: Sequence[RoundRecord]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Virtual seconds and perplexity after each round."""
        return [(r.clock, fleet_accuracy(self.job, r.accuracy, "perplexity")) for r in self.records]

    @property
    def best(self) -> tuple[float, float]:
        """Virtual seconds and perplexity of the best round, within equal samples."""
        return min(self.curve[: self.equal], key=lambda point: point[1])

    @property
    def end(self) -> RoundRecord:
        """The last round within equal samples."""
        return self.records[self.equal - 1]

    @property
    def moves(self) -> int:
        """Number of moves to another cut."""
        return sum(len(r.moves) for r in self.records[: self.equal])

    @property
    def hub_busy(self) -> float:
        """Fraction of the time in which the hub computes."""
        assert self.job.hub_gflops is not None
        return self.end.costs["trunk_flop"] / (1e9 * self.job.hub_gflops) / self.end.clock

    def seconds_to(self, perplexity: float) -> float | None:
        """Return the virtual seconds until the perplexity is this low; None if it never is."""
        return next((s for s, value in self.curve if value <= perplexity), None)

    def megabytes(self, *kinds: str) -> float:
        """Return the traffic up and down of these kinds of messages, or of all kinds if none."""
        return sum(
            sum(ways.values()) for kind, ways in self.end.bytes.items()
            if kind in kinds or not kinds
        ) / 1e6  # fmt: skip

    def row(self, before: float) -> dict[str, object]:
        """Return the run as a row of the JSON file."""
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
"""Runs by setting and seed."""


# --- tables ---------------------------------------------------------------------------------------


def lines(runs: Runs) -> dict[Setting, list[Run]]:
    """Return the runs of each setting, seed by seed, in the order of :data:`SETTINGS`."""
    found = {s: [run for (setting, _), run in runs.items() if setting == s] for s in SETTINGS}
    return {setting: cells for setting, cells in found.items() if cells}


def name_of(setting: Setting) -> list[str]:
    """Return the first columns of a table line."""
    if setting.policy == CENTRALIZED:
        return [setting.policy, "", str(setting.rank), ""]
    return [setting.policy, setting.partition, str(setting.rank), str(setting.clients)]


NAMES = ["policy", "partition", "cut rank", "clients"]


def times_to_fixed(runs: Runs, setting: Setting) -> list[tuple[float | None, float]]:
    """Return the seconds to the fixed cut's best perplexity, by seed: the setting's and its own."""
    fixed = replace(setting, policy=START)
    pairs = [
        (run, runs[fixed, seed]) for (s, seed), run in runs.items()
        if s == setting and (fixed, seed) in runs
    ]  # fmt: skip
    return [(run.seconds_to(other.best[1]), other.best[0]) for run, other in pairs]


def perplexity_table(runs: Runs) -> Table:
    """Return a line per setting: perplexity, time, and time to the fixed cut's perplexity."""
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
        f"Lowest perplexity at equal samples, virtual seconds of the job, and virtual seconds to "
        f"the lowest perplexity of {START}; mean ± standard deviation"
    )
    return Table(title, header, rows, 2)


def costs_table(runs: Runs) -> Table:
    """Return a line per setting: traffic by kind, moves, and the load of the hub."""
    rows = []
    for setting, cells in lines(runs).items():
        if setting.policy == CENTRALIZED:
            continue
        kinds = (("update", "blob"), ("activations",), ("gradient",), ())
        rows.append(
            [
                *name_of(setting),
                *(three_digits(fmean(run.megabytes(*kind) for run in cells)) for kind in kinds),
                three_digits(fmean(run.moves for run in cells)),
                f"{fmean(run.hub_busy for run in cells):.0%}",
            ]
        )
    header = [*NAMES, "adapters", "activations", "gradients", "all", "moves", "hub busy"]
    title = (
        "Traffic of all devices up and down in MB (adapters with their optimizer slots), moves to "
        "another cut, fraction of the time in which the hub computes; means"
    )
    return Table(title, header, rows, 2)


TIME_TARGET, CENTRALIZED_TARGET = 0.70, 1.02


def time_verdict(runs: Runs) -> str:
    """Say whether adaptive cuts reach the fixed cut's best perplexity within the time target."""
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
    """Say whether adaptive cuts are within the target of centralized training."""
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
    """Return a setting without its policy, for sentences."""
    return f"{setting.partition}, rank {setting.rank}, {setting.clients} clients"


def answer(met: int, found: Sequence[str]) -> str:
    """Return whether a target is met, with the figures."""
    if not found:
        return "not measured yet."
    verdict = "met" if met == len(found) else f"met in {met} of {len(found)} settings"
    return f"**{verdict if met else 'not met'}** ({'; '.join(found)})."


# --- the picture ---------------------------------------------------------------------------------

COLOURS = {ADAPTIVE: "#d62728", "cut 2": "#1f77b4", "cut 4": "#17becf", "cut 6": "#7f7f7f"}


def draw(runs: Runs, path: Path) -> None:
    """Draw perplexity over virtual time: a panel per partition and fleet, a line per policy.

    A line is the mean over the seeds; its band is from the lowest to the highest. All lines have
    the rank of most settings.
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
            # By round: the points of all seeds.
            points = list(zip(*(run.curve for run in cells), strict=True))
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
        tidy(axis)
    axes[0].set(ylabel="perplexity")
    axes[-1].legend(loc="upper right", title="policy")
    save_figure(figure, path)
