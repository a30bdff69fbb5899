"""The runs of :mod:`benchmarks.splitmix`: curves, scores and operations."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import torch
from torch.utils.flop_counter import FlopCounterMode

from export.bundles.model_source import build_model
from server_hub.methods.baselines.widths import step_flops
from server_hub.simulation.job import Job
from server_hub.storage.run_folder import RoundRecord

WIDTHS = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0}
"""Widths: the fraction of the channels of FedAvg and HeteroFL, of the bases of Split-Mix."""
BASES = 8
SPLITMIX, FEDAVG, HETEROFL = "Split-Mix", "FedAvg", "HeteroFL"
UNMASKED = "Split-Mix, unmasked"
"""Split-Mix with a loss over all classes, also those that a device has no examples of."""
MIXES = (SPLITMIX, UNMASKED)
DUAL, ADVERSARIAL, PLAIN = "dual", "adversarial", "plain"
ROBUST_NAMES = {
    DUAL: "Split-Mix, dual norms",
    ADVERSARIAL: "FedAvg, adversarial training",
    PLAIN: "FedAvg",
}
SHAPES = {"cifar10": (3, 32, 32), "digits": (1, 8, 8)}
"""Shape of an example, by data."""


@dataclass(frozen=True)
class Setting:
    """The values that the cells of a table line share.

    Attributes:
        data: ``cifar10`` or ``digits``.
        partition: name of the partition.
        method: one of the four methods, or a key of :data:`ROBUST_NAMES`.
        width: width of FedAvg's model, a key of :data:`WIDTHS`; other methods train all widths.
    """

    data: str
    partition: str
    method: str
    width: str = "1"

    @property
    def model(self) -> str:
        """The value of ``model`` in the job."""
        return model_name(self.data, self.width)


def model_name(data: str, width: str) -> str:
    """Return the name of the benchmark's model for some data in a width."""
    short = {"cifar10": "cifar"}.get(data, data)
    return f"benchmarks.splitmix_model:{short}_{width.replace('/', '_')}"


@dataclass(frozen=True)
class Point:
    """A measured round.

    Attributes:
        round: number of the round.
        flop: operations of all devices' steps until the end of the round.
        accuracy: accuracy on the held-out examples.
    """

    round: int
    flop: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """A finished cell.

    Attributes:
        setting: setting of the cell.
        job: job of the cell.
        records: rounds of the cell.
        robust: rows of :func:`benchmarks.splitmix.measure_robustness`; empty if not measured.
    """

    setting: Setting
    job: Job
    records: Sequence[RoundRecord]
    robust: Sequence[Mapping[str, float]] = ()

    @property
    def clients(self) -> int:
        """Number of devices that have taken part."""
        return self.records[-1].devices

    @property
    def flop(self) -> float:
        """Operations of all devices' steps."""
        return self._share * self.records[-1].costs["device_flop"]

    @property
    def _share(self) -> float:
        """Fraction of the charged operations that the steps need.

        HeteroFL's devices draw a width in every step and are charged for their full width.
        """
        return drawn_share(self.setting.data) if self.setting.method == HETEROFL else 1.0

    def curve(self, width: str) -> list[Point]:
        """Return the measured rounds of a width; for Split-Mix, of as many bases."""
        found = []
        for record in self.records:
            if self.setting.method in MIXES:
                value = record.mixed.get(str(bases_of(width)))
            else:
                value = next(
                    (paths["device_alone"] for tier, paths in record.accuracy.items()
                     if self.setting.method == FEDAVG
                     or self.job.tiers[tier].budget == WIDTHS[width]),
                    None,
                )  # fmt: skip
            if value is not None and record.accuracy:
                flop = self._share * record.costs["device_flop"]
                found.append(Point(record.round, flop, value))
        return found

    def row(self) -> dict[str, object]:
        """Return the run as a row of the JSON file."""
        widths = [self.setting.width] if self.setting.method == FEDAVG else list(WIDTHS)
        robust = self.setting.method in ROBUST_NAMES
        return {
            "data": self.setting.data,
            "partition": self.setting.partition,
            "method": self.setting.method,
            "width": self.setting.width,
            "seed": self.job.seed,
            "clients": self.clients,
            "device_flop": self.flop,
            "up_bytes": self.records[-1].up,
            "down_bytes": self.records[-1].down,
            "curves": {}
            if robust
            else {w: [(p.round, p.flop, p.accuracy) for p in self.curve(w)] for w in widths},
            "robust": list(self.robust),
        }


Runs = dict[tuple[Setting, int], Run]
"""Runs by setting and seed."""


def bases_of(width: str) -> int:
    """Return the number of bases that have as many channels as a model of this width."""
    return round(WIDTHS[width] * BASES)


def at_flop(curve: Sequence[Point], flop: float) -> float:
    """Return the accuracy after ``flop`` operations, interpolated between two measured rounds.

    Before the first measured round it is that of the first, after the last that of the last.
    """
    after = bisect_left([p.flop for p in curve], flop)
    if after == len(curve) or after == 0:
        return curve[min(after, len(curve) - 1)].accuracy
    a, b = curve[after - 1], curve[after]
    return a.accuracy + (b.accuracy - a.accuracy) * (flop - a.flop) / (b.flop - a.flop)


@dataclass(frozen=True)
class Scores:
    """Accuracy of a method at a width, seed by seed.

    Attributes:
        final: accuracy after the last round.
        best: accuracy in the best round.
        equal: accuracy after as many operations as Split-Mix has spent with the same seed, or at
            the end of a run that ended before. Empty if Split-Mix has not run.
        ended: whether a run ended before.
    """

    final: list[float]
    best: list[float]
    equal: list[float]
    ended: bool


class Panel:
    """The runs on one data set and partition.

    Args:
        runs: all runs.
        data: name of the data, a key of :data:`SHAPES`.
        partition: name of the partition.
    """

    def __init__(self, runs: Runs, data: str, partition: str) -> None:
        self.data, self.partition = data, partition
        self.runs = {
            (s.method, s.width, seed): run
            for (s, seed), run in runs.items()
            if (s.data, s.partition) == (data, partition) and s.method not in ROBUST_NAMES
        }

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.data}, {self.partition}"

    def runs_of(self, method: str, width: str) -> dict[int, Run]:
        """Return, by seed, the runs that train a method's model of a width."""
        trained = width if method == FEDAVG else "1"
        return {seed: r for (m, w, seed), r in self.runs.items() if (m, w) == (method, trained)}

    def scores(self, method: str, width: str) -> Scores:
        """Return the accuracy of a method at a width; empty if it has not run."""
        found = Scores([], [], [], False)
        for seed, run in self.runs_of(method, width).items():
            curve = run.curve(width)
            found.final.append(curve[-1].accuracy)
            found.best.append(max(p.accuracy for p in curve))
            reference = self.runs.get((SPLITMIX, "1", seed))
            if reference is not None:
                found.equal.append(at_flop(curve, reference.flop))
                if run.flop < 0.999 * reference.flop:
                    found = replace(found, ended=True)
        return found

    def gains(
        self, method: str, width: str, equal: bool, bases: str = "", ours: str = SPLITMIX
    ) -> list[float]:
        """Return the percentage points that Split-Mix is ahead of a method, seed by seed.

        Args:
            method: the other method.
            width: width of the other method.
            equal: whether to compare at equal operations; otherwise at equal rounds.
            bases: width of Split-Mix; by default that of the other method.
            ours: the form of Split-Mix, one of :data:`MIXES`.
        """
        bases = bases or width
        mine, its = self.runs_of(ours, bases), self.runs_of(method, width)
        found = []
        for seed in sorted(mine.keys() & its.keys()):
            curve = its[seed].curve(width)
            value = at_flop(curve, mine[seed].flop) if equal else curve[-1].accuracy
            found.append(100 * (mine[seed].curve(bases)[-1].accuracy - value))
        return found


def panels(runs: Runs) -> list[Panel]:
    """Return the panels that have runs, in the order of the settings."""
    named = dict.fromkeys(
        (s.data, s.partition) for s, _ in runs if s.method not in ROBUST_NAMES
    )  # fmt: skip
    return [Panel(runs, data, partition) for data, partition in named]


# --- costs of a model -----------------------------------------------------------------------------


@cache
def inference_flop(data: str, width: str) -> float:
    """Return the operations of an answer to one example."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        build_model(model_name(data, width)).eval()(torch.zeros(1, *SHAPES[data]))
    return float(counter.get_total_flops())


@cache
def parameters(data: str, width: str) -> int:
    """Return the number of parameters of a model in a width."""
    return sum(p.numel() for p in build_model(model_name(data, width)).parameters())


@cache
def drawn_share(data: str) -> float:
    """Return the operations of HeteroFL's steps at the drawn widths, relative to the full widths.

    There are as many devices of each full width, and a device draws from the widths up to its own.
    """
    example = torch.zeros(2, *SHAPES[data])
    needs = [step_flops(build_model(model_name(data, w)), example) for w in WIDTHS]
    drawn = [fmean(needs[: i + 1]) for i in range(len(needs))]
    return sum(drawn) / sum(needs)


def use_of(data: str, method: str, width: str) -> tuple[float, int]:
    """Return the operations of an answer, and the number of parameters."""
    if method not in MIXES:
        return inference_flop(data, width), parameters(data, width)
    bases = bases_of(width)
    return bases * inference_flop(data, "1/8"), bases * parameters(data, "1/8")
