"""Tables, verdicts and pictures of the runs of :mod:`benchmarks.splitmix`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.splitmix_runs import (
    ADVERSARIAL,
    BASES,
    DUAL,
    FEDAVG,
    HETEROFL,
    MIXES,
    PLAIN,
    ROBUST_NAMES,
    SPLITMIX,
    UNMASKED,
    WIDTHS,
    Panel,
    Run,
    Runs,
    panels,
    use_of,
)
from server_hub.reports.files import save_figure, tidy
from server_hub.reports.table import Table
from server_hub.reports.values import percent as share
from server_hub.reports.values import spread, three_digits

# --- tables ---------------------------------------------------------------------------------------


def percent(values: Sequence[float]) -> str:
    """Format the mean in %, with the standard deviation if there are several values."""
    return spread(values, share) if values else "-"


def panel_table(panel: Panel) -> Table:
    """Return a line per method and width: accuracy and costs."""
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
                row += [three_digits(value) for value in costs]
            else:
                row += [""] * 3
            rows.append(row)
        if method == FEDAVG and rows and len(rows) > len(WIDTHS):
            all_widths = ["", "", "", "", "", *(three_digits(value) for value in spent)]
            rows.append(["FedAvg", "all four", *all_widths])
    header = [
        "method", "width", "accuracy", "best round", "equal FLOPs", "MFLOP", "parameters",
        "training GFLOP", "down MB", "up MB",
    ]  # fmt: skip
    seeds = len({seed for _, _, seed in panel.runs})
    return Table(f"{panel.name}: accuracy in %, seeds: {seeds}", header, rows, 2)


def training_costs(runs: Sequence[Run]) -> list[float]:
    """Return means: GFLOP of all devices, MB down and MB up per device of the fleet."""
    return [
        fmean(run.flop / 1e9 for run in runs),
        fmean(run.records[-1].down / 1e6 / run.job.clients for run in runs),
        fmean(run.records[-1].up / 1e6 / run.job.clients for run in runs),
    ]


def robust_points(runs: Runs) -> dict[tuple[str, int, float], list[tuple[float, float]]]:
    """Return clean and robust accuracy of each seed, by method, bases and robustness."""
    found: dict[tuple[str, int, float], list[tuple[float, float]]] = {}
    for (setting, _), run in runs.items():
        for row in run.robust:
            key = (setting.method, int(row["bases"]), float(row["robustness"]))
            found.setdefault(key, []).append((row["clean"], row["robust"]))
    return {key: found[key] for key in sorted(found, key=_robust_order)}


def _robust_order(key: tuple[str, int, float]) -> tuple[int, int, float]:
    return list(ROBUST_NAMES).index(key[0]), key[1], key[2]


def robust_table(runs: Runs, attack: str) -> Table:
    """Return a line per method, number of bases and robustness."""
    rows = []
    for (method, bases, wanted), points in robust_points(runs).items():
        clean, robust = zip(*points, strict=True)
        where = [str(bases), f"{wanted:g}"] if method == DUAL else ["", ""]
        rows.append([ROBUST_NAMES[method], *where, percent(clean), percent(robust)])
    return Table(
        f"digits, pixels from 0 to 1: accuracy in % on clean examples and under {attack}",
        ["method", "bases", "robustness", "clean", "attacked"],
        rows,
        1,
    )


# --- verdicts -------------------------------------------------------------------------------------


def verdict(runs: Runs, method: str, equal: bool, ours: str = SPLITMIX) -> str:
    """Say whether Split-Mix beats another method at each width."""
    cases = {
        panel.name: {w: panel.gains(method, w, equal, ours=ours) for w in WIDTHS}
        for panel in panels(runs)
    }
    at = "equal training FLOPs" if equal else "equal rounds"
    return f"{ours}, n of 8 bases, beats {method} of n/8 of the width at {at}: {answer(cases)}"


def inference_verdict(runs: Runs) -> str:
    """Say whether 4 bases beat models of a quarter of the width, which take as many operations."""
    cases = {
        panel.name: {
            method: panel.gains(method, "1/4", equal=False, bases="1/2")
            for method in (FEDAVG, HETEROFL)
        }
        for panel in panels(runs)
    }
    return (
        "Split-Mix with 4 bases beats a model of a quarter of the width, which takes about as many "
        f"operations per answer, at equal rounds: {answer(cases)}"
    )


def robust_verdict(runs: Runs) -> str:
    """Say whether 8 bases match adversarial training, clean and attacked, with some robustness."""
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
        "With some robustness, Split-Mix with 8 bases and dual norms is at least as accurate as "
        "FedAvg with adversarial training, on clean and on attacked examples "
        f"({100 * clean:.1f} and {100 * robust:.1f} %): {answered} ({shown} %)."
    )


def points(values: Sequence[float]) -> str:
    """Format percentage points with a sign: the mean, with the standard deviation if several."""
    return f"{fmean(values):+.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def answer(cases: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Say how often Split-Mix is ahead in the mean over the seeds, and by how many points.

    Args:
        cases: points that Split-Mix is ahead by, seed by seed, by panel and case; empty if not
            measured.
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
        f"**{said}**; ahead by more than the standard deviation over the seeds in {won}, behind in "
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


# --- pictures -------------------------------------------------------------------------------------

COLOURS = {SPLITMIX: "#d62728", UNMASKED: "#ff9896", FEDAVG: "#1f77b4", HETEROFL: "#2ca02c"}
ROBUST_COLOURS = {1: "#ff9896", 4: "#e377c2", 8: "#d62728"}


def draw(runs: Runs, path: Path) -> None:
    """Draw accuracy over the operations of an answer.

    There is a panel per data and partition, and a line per method. A point is the mean over the
    seeds, its bar the standard deviation.
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
    save_figure(figure, path)


def draw_robust(runs: Runs, path: Path) -> None:
    """Draw robust over clean accuracy: per number of bases, a line over the robustness."""
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
    save_figure(figure, path)


def _axes(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.2 * panels, 6), 4), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        tidy(axis)
    return figure, axes
