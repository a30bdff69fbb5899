"""What the runs of :mod:`benchmarks.splitmix` have come to: curves, tables, verdicts, pictures."""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.bundle.store import write_atomically
from export.build import build_model
from export.width import step_flops
from server_hub.simulation.job import Job
from server_hub.simulation.results import Grid, figure
from server_hub.storage.run_folder import RoundRecord

WIDTHS = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0}
"""Parts of the channels that FedAvg and HeteroFL train; and of the bases that Split-Mix mixes."""
BASES = 8
SPLITMIX, FEDAVG, HETEROFL = "Split-Mix", "FedAvg", "HeteroFL"
UNMASKED = "Split-Mix, unmasked"
"""With a loss over all classes, where a device does not have examples of each."""
MIXES = (SPLITMIX, UNMASKED)
DUAL, ADVERSARIAL, PLAIN = "dual", "adversarial", "plain"
ROBUST_NAMES = {
    DUAL: "Split-Mix, dual norms",
    ADVERSARIAL: "FedAvg, adversarial training",
    PLAIN: "FedAvg",
}
SHAPES = {"cifar10": (3, 32, 32), "digits": (1, 8, 8)}
"""Of an example."""


@dataclass(frozen=True)
class Setting:
    """What the cells of a line in the tables have in common.

    Attributes:
        data: ``cifar10`` or ``digits``.
        partition: its name.
        method: one of the four, or a key of :data:`ROBUST_NAMES`.
        width: of FedAvg's model, a key of :data:`WIDTHS`; the others have all.
    """

    data: str
    partition: str
    method: str
    width: str = "1"

    @property
    def model(self) -> str:
        """For ``model`` of a job."""
        return model_name(self.data, self.width)


def model_name(data: str, width: str) -> str:
    """The benchmark's model for some data in a width."""
    short = {"cifar10": "cifar"}.get(data, data)
    return f"benchmarks.splitmix_model:{short}_{width.replace('/', '_')}"


@dataclass(frozen=True)
class Point:
    """A measured round.

    Attributes:
        round: its number.
        flop: operations of all devices' steps until then.
        accuracy: on the held-out examples.
    """

    round: int
    flop: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """A cell that is at its end.

    Attributes:
        setting: its setting.
        job: its job.
        records: its rounds.
        robust: answers to hardened examples, where these were measured: see
            :func:`benchmarks.splitmix.measure_robustness`.
    """

    setting: Setting
    job: Job
    records: Sequence[RoundRecord]
    robust: Sequence[Mapping[str, float]] = ()

    @property
    def clients(self) -> int:
        """Devices that have taken part."""
        return self.records[-1].devices

    @property
    def flop(self) -> float:
        """Operations of all devices' steps."""
        return self._share * self.records[-1].costs["device_flop"]

    @property
    def _share(self) -> float:
        """Part of the operations that are charged which are needed.

        HeteroFL's devices draw a width in every step and are charged the whole of their own.
        """
        return drawn_share(self.setting.data) if self.setting.method == HETEROFL else 1.0

    def curve(self, width: str) -> list[Point]:
        """The measured rounds of a width; for Split-Mix, of so many bases."""
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
        """For the file."""
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
"""By setting and seed."""


def bases_of(width: str) -> int:
    """How many bases are as many channels as a model of this width has."""
    return round(WIDTHS[width] * BASES)


def at_flop(curve: Sequence[Point], flop: float) -> float:
    """Accuracy when so many operations were spent: between two rounds a straight line.

    Before the first measured round it is that one's, after the last the last's.
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
        final: after the last round.
        best: in the best round.
        equal: after as many operations as Split-Mix has spent with the same seed; of a run that
            ended before, at its end. Empty where Split-Mix has not run.
        ended: whether it ended before.
    """

    final: list[float]
    best: list[float]
    equal: list[float]
    ended: bool


class Panel:
    """The runs on one data set and partition.

    Args:
        runs: all.
        data: key of :data:`SHAPES`.
        partition: its name.
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
        """By seed: the runs that give a method's model of a width."""
        trained = width if method == FEDAVG else "1"
        return {seed: r for (m, w, seed), r in self.runs.items() if (m, w) == (method, trained)}

    def scores(self, method: str, width: str) -> Scores:
        """Accuracy of a method at a width; empty where it has not run."""
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
        """Points that Split-Mix is ahead of a method at a width, seed by seed.

        Args:
            method: the other.
            width: of the other.
            equal: at as many operations as Split-Mix, else after as many rounds.
            bases: width of Split-Mix; that of the other if it is not given.
            ours: one of :data:`MIXES`.
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
    """Those that have runs, in the order of the settings."""
    named = dict.fromkeys(
        (s.data, s.partition) for s, _ in runs if s.method not in ROBUST_NAMES
    )  # fmt: skip
    return [Panel(runs, data, partition) for data, partition in named]


# --- what a model takes ---------------------------------------------------------------------------


@cache
def inference_flop(data: str, width: str) -> float:
    """Operations of an answer to one example."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        build_model(model_name(data, width)).eval()(torch.zeros(1, *SHAPES[data]))
    return float(counter.get_total_flops())


@cache
def parameters(data: str, width: str) -> int:
    """Of a model in a width."""
    return sum(p.numel() for p in build_model(model_name(data, width)).parameters())


@cache
def drawn_share(data: str) -> float:
    """Operations of HeteroFL's steps at the widths that devices draw, of those at their own.

    There are as many devices of each width, and a device draws from those up to its own.
    """
    example = torch.zeros(2, *SHAPES[data])
    needs = [step_flops(build_model(model_name(data, w)), example) for w in WIDTHS]
    drawn = [fmean(needs[: i + 1]) for i in range(len(needs))]
    return sum(drawn) / sum(needs)


def use_of(data: str, method: str, width: str) -> tuple[float, int]:
    """Operations of an answer, and parameters."""
    if method not in MIXES:
        return inference_flop(data, width), parameters(data, width)
    bases = bases_of(width)
    return bases * inference_flop(data, "1/8"), bases * parameters(data, "1/8")


# --- tables ---------------------------------------------------------------------------------------


def percent(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several, in %."""
    if not values:
        return "-"
    deviation = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{deviation}"


def panel_grid(panel: Panel) -> Grid:
    """A line per method and width: accuracy, and what it takes."""
    rows = []
    for method in (*MIXES, FEDAVG, HETEROFL):
        spent = [0.0, 0.0, 0.0]
        for width in WIDTHS:
            runs = list(panel.runs_of(method, width).values())
            if not runs:
                continue
            scores = panel.scores(method, width)
            flop, size = use_of(panel.data, method, width)
            row = [method, width, percent(scores.final), percent(scores.best)]
            row += [percent(scores.equal) + (" *" if scores.ended else "")]
            row += [f"{flop / 1e6:.3f}", f"{size:,}"]
            if method == FEDAVG or width == "1/8":
                costs = training_costs(runs)
                spent = [a + b for a, b in zip(spent, costs, strict=True)]
                row += [figure(value) for value in costs]
            else:
                row += [""] * 3
            rows.append(row)
        if method == FEDAVG and rows and len(rows) > len(WIDTHS):
            all_widths = ["", "", "", "", "", *(figure(value) for value in spent)]
            rows.append(["FedAvg", "all four", *all_widths])
    header = [
        "method", "width", "accuracy", "best round", "equal FLOPs", "MFLOP", "parameters",
        "training GFLOP", "down MB", "up MB",
    ]  # fmt: skip
    seeds = len({seed for _, _, seed in panel.runs})
    return Grid(f"{panel.name}: accuracy in %, seeds: {seeds}", header, rows, 2)


def training_costs(runs: Sequence[Run]) -> list[float]:
    """GFLOP of all devices, MB down and MB up per device of the fleet; means."""
    return [
        fmean(run.flop / 1e9 for run in runs),
        fmean(run.records[-1].down / 1e6 / run.job.clients for run in runs),
        fmean(run.records[-1].up / 1e6 / run.job.clients for run in runs),
    ]


def robust_points(runs: Runs) -> dict[tuple[str, int, float], list[tuple[float, float]]]:
    """By method, bases and robustness: clean and robust accuracy of each seed."""
    found: dict[tuple[str, int, float], list[tuple[float, float]]] = {}
    for (setting, _), run in runs.items():
        for row in run.robust:
            key = (setting.method, int(row["bases"]), float(row["robustness"]))
            found.setdefault(key, []).append((row["clean"], row["robust"]))
    return {key: found[key] for key in sorted(found, key=_robust_order)}


def _robust_order(key: tuple[str, int, float]) -> tuple[int, int, float]:
    return list(ROBUST_NAMES).index(key[0]), key[1], key[2]


def robust_grid(runs: Runs, attack: str) -> Grid:
    """A line per method, number of bases and robustness."""
    rows = []
    for (method, bases, wanted), points in robust_points(runs).items():
        clean, robust = zip(*points, strict=True)
        where = [str(bases), f"{wanted:g}"] if method == DUAL else ["", ""]
        rows.append([ROBUST_NAMES[method], *where, percent(clean), percent(robust)])
    return Grid(
        f"digits, from 0 to 1: accuracy in % on examples as they are and under {attack}",
        ["method", "bases", "robustness", "clean", "attacked"],
        rows,
        1,
    )


# --- verdicts -------------------------------------------------------------------------------------


def verdict(runs: Runs, method: str, equal: bool, ours: str = SPLITMIX) -> str:
    """Whether Split-Mix beats another method width by width."""
    cases = {
        panel.name: {w: panel.gains(method, w, equal, ours=ours) for w in WIDTHS}
        for panel in panels(runs)
    }
    at = "as many training FLOPs as Split-Mix has spent" if equal else "equal rounds"
    return f"{ours}, n of 8 bases, beats {method} of n/8 of the width at {at}: {answer(cases)}"


def inference_verdict(runs: Runs) -> str:
    """Whether 4 bases beat the models that take about as many operations, a quarter as wide."""
    cases = {
        panel.name: {
            method: panel.gains(method, "1/4", equal=False, bases="1/2")
            for method in (FEDAVG, HETEROFL)
        }
        for panel in panels(runs)
    }
    return (
        "Split-Mix with 4 bases beats a model of a quarter of the width, about as many operations "
        f"an answer, at equal rounds: {answer(cases)}"
    )


def robust_verdict(runs: Runs) -> str:
    """Whether some robustness of 8 bases is as good as adversarial training in both ways."""
    found = {key: [fmean(v) for v in zip(*points, strict=True)]
             for key, points in robust_points(runs).items()}  # fmt: skip
    line = {key[2]: value for key, value in found.items() if key[:2] == (DUAL, BASES)}
    rival = next((value for key, value in found.items() if key[0] == ADVERSARIAL), None)
    if not line or rival is None:
        return "Split-Mix with dual norms against FedAvg with adversarial training: not run yet."
    clean, robust = rival
    both = [f"{w:g}" for w, (c, r) in line.items() if c >= clean and r >= robust]
    shown = ", ".join(f"{w:g}: {100 * c:.1f} and {100 * r:.1f}" for w, (c, r) in line.items())
    answered = f"**yes**, at {', '.join(both)}" if both else "**no**"
    return (
        "Some robustness of Split-Mix with 8 bases and dual norms is at least as accurate clean "
        f"and attacked as FedAvg with adversarial training ({100 * clean:.1f} and "
        f"{100 * robust:.1f} %): {answered} ({shown} %)."
    )


def points(values: Sequence[float]) -> str:
    """Percentage points, with a sign: mean, and standard deviation where there are several."""
    return f"{fmean(values):+.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def answer(cases: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """How often Split-Mix is ahead in the mean over the seeds, how clearly, by how many points.

    Args:
        cases: by panel and case, points that it is ahead, seed by seed; empty where not measured.
    """
    every = [values for found in cases.values() for values in found.values() if values]
    if not every:
        return "not run yet."
    ahead = sum(fmean(values) > 0 for values in every)
    said = "yes" if ahead == len(every) else f"in {ahead} of {len(every)} cases" if ahead else "no"
    clear = [fmean(v) for v in every if len(v) > 1 and abs(fmean(v)) > stdev(v)]
    won = sum(mean > 0 for mean in clear)
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{case}: {points(v)}" for case, v in found.items() if v)
        for name, found in cases.items()
        if any(found.values())
    )
    return (
        f"**{said}**; by more than the standard deviation over the seeds ahead in {won}, behind in "
        f"{len(clear) - won} (points: {shown})."
    )


def verdicts(runs: Runs) -> Iterator[str]:
    """All."""
    for method in (FEDAVG, HETEROFL):
        for equal in (False, True):
            yield verdict(runs, method, equal)
    for method in (FEDAVG, HETEROFL):
        for equal in (False, True):
            yield verdict(runs, method, equal, UNMASKED)
    yield inference_verdict(runs)
    yield robust_verdict(runs)


def json_of(runs: Runs) -> bytes:
    """A row per run."""
    lines = ",\n".join(json.dumps(run.row()) for run in runs.values())
    return f"[\n{lines}\n]\n".encode()


# --- pictures -------------------------------------------------------------------------------------

COLOURS = {SPLITMIX: "#d62728", UNMASKED: "#ff9896", FEDAVG: "#1f77b4", HETEROFL: "#2ca02c"}
ROBUST_COLOURS = {1: "#ff9896", 4: "#e377c2", 8: "#d62728"}


def draw(runs: Runs, path: Path) -> None:
    """Accuracy over the operations of an answer: a panel per data and partition, a line a method.

    A point is the mean over the seeds, its bar the standard deviation.
    """
    found = panels(runs)
    figure, axes = _axes(len(found))
    for axis, panel in zip(axes, found, strict=True):
        for method, colour in COLOURS.items():
            scores = {w: panel.scores(method, w).final for w in WIDTHS}
            shown = {w: values for w, values in scores.items() if values}
            if not shown:
                continue
            flop = [use_of(panel.data, method, w)[0] / 1e6 for w in shown]
            mean = [100 * fmean(values) for values in shown.values()]
            bars = [100 * stdev(v) if len(v) > 1 else 0.0 for v in shown.values()]
            axis.errorbar(flop, mean, bars, color=colour, marker="o", capsize=2, label=method)
        axis.set(title=panel.name, xlabel="MFLOP per answer", xscale="log")
    axes[0].set(ylabel="accuracy (%)")
    lines = {a.get_label(): a for axis in axes for a in axis.get_legend_handles_labels()[0]}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    _save(figure, path)


def draw_robust(runs: Runs, path: Path) -> None:
    """Robust over clean accuracy: a line over the robustness per number of bases."""
    found = robust_points(runs)
    figure, (axis,) = _axes(1)
    means = {k: [100 * fmean(v) for v in zip(*p, strict=True)] for k, p in found.items()}
    for bases, colour in ROBUST_COLOURS.items():
        line = {k[2]: v for k, v in means.items() if k[:2] == (DUAL, bases)}
        if not line:
            continue
        axis.plot(
            *zip(*line.values(), strict=True),
            color=colour,
            marker=".",
            label=f"Split-Mix, bases: {bases}",
        )
        for wanted, place in line.items():
            axis.annotate(f"{wanted:g}", place, fontsize=7, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    for method, marker in ((ADVERSARIAL, "s"), (PLAIN, "^")):
        for key, (clean, robust) in means.items():
            if key[0] == method:
                axis.plot(clean, robust, marker, color=COLOURS[FEDAVG], label=ROBUST_NAMES[method])
    axis.set(xlabel="clean accuracy (%)", ylabel="accuracy under attack (%)")
    axis.legend(fontsize=8)
    _save(figure, path)


def _axes(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.2 * panels, 6), 4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write_atomically(path, picture.getvalue())
