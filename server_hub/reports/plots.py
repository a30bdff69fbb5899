"""Pictures of a run, of a partition and of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.inference.metrics import Metric
from edge_sdk.protocol.tensors import Array
from server_hub.reports.comparison import Point, Score, Summary
from server_hub.reports.files import save_figure, tidy
from server_hub.reports.rounds import natural
from server_hub.reports.values import LABELS, best, scale_of, shown
from server_hub.storage.run_folder import RoundRecord

_WRITTEN = 24
"""Clients or classes up to which the cells of a partition hold their numbers."""

_NAMED = 36
"""Devices up to which the picture of the cuts names them all."""

_APART = 10
"""A scale is logarithmic if one method's curve ends this many times further out than another's."""

_LINES = [
    ("#1f77b4", "-", "o"), ("#17becf", "--", "o"), ("#7f7f7f", "-", "s"), ("#d62728", "-", "s"),
    ("#2ca02c", "-", "^"), ("#bcbd22", "-", "v"), ("#9467bd", "-", "D"), ("#ff7f0e", "-", "P"),
    ("#8c564b", "--", "X"), ("#e377c2", "-", "*"), ("#000000", ":", ""),
]  # fmt: skip
"""Colour, line and marker of each method, in the order of all methods."""


def draw_partition(counts: Array, path: Path, title: str) -> None:
    """The rows that each client holds, in all and of each class.

    A heat map, one column per client and one row per class, under a bar per client. Colours
    follow the square root of the count, which keeps small counts visible; white is zero.

    Args:
        counts: rows by client and class (clients, classes).
        path: ``.png`` to write.
        title: what the partition is.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    written = clients <= _WRITTEN and classes <= _WRITTEN
    width = float(np.clip(2.5 + 0.45 * clients, 6, 13))
    height = float(np.clip(1.2 + 0.3 * classes, 2.5, 8))
    figure = Figure(figsize=(width, 1.6 + height), layout="constrained")
    sizes, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height])

    sizes.bar(np.arange(clients), counts.sum(1), width=0.9 if clients <= 100 else 1.0)
    sizes.set(title=title, ylabel="rows", xlim=(-0.5, clients - 0.5))
    sizes.spines[["top", "right"]].set_visible(False)
    sizes.tick_params(axis="x", length=0)

    # Without the palest blues: a single row must differ from none.
    colours = ListedColormap(colormaps["Blues"](np.linspace(0.2, 1, 256))).with_extremes(
        bad="white"
    )
    norm = PowerNorm(0.5, vmin=1, vmax=max(int(counts.max()), 2))
    shown = np.ma.masked_equal(counts.T, 0)
    picture = cells.imshow(shown, colours, norm, aspect="auto", interpolation="nearest")
    cells.set(xlabel="client", ylabel="class")
    for axis, count in ((cells.xaxis, clients), (cells.yaxis, classes)):
        axis.set_major_locator(MaxNLocator(min(count, 20), integer=True, steps=[1, 2, 5, 10]))
    if written:
        cells.set_xticks(np.arange(clients))
        cells.set_yticks(np.arange(classes))
        for client, label in np.argwhere(counts):
            count = int(counts[client, label])
            ink = "white" if norm(count) > 0.5 else "black"
            cells.text(client, label, str(count), ha="center", va="center", fontsize=7, color=ink)
    ticks = np.unique(np.round(norm.inverse(np.linspace(0, 1, 6))))
    figure.colorbar(picture, ax=cells, label="rows of a class", pad=0.01, ticks=ticks)
    save_figure(figure, path)


def draw_comparison(found: Summary, path: Path, methods: Sequence[str]) -> None:
    """Accuracy or perplexity of methods against rounds, traffic and virtual time, and by tier.

    Above, the fleet's accuracy or perplexity: a line per method, the mean over the seeds, in a
    band from the lowest to the highest. Below, that of each tier at the end.

    Args:
        found: means over the seeds, with at least one measured round of each method.
        path: ``.png`` to write.
        methods: all methods that there are; a method's colour is that of its place here.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1.15, 1])
    first = figure.add_subplot(grid[0, 0])
    axes = [first, *(figure.add_subplot(grid[0, column], sharey=first) for column in (1, 2))]
    styles = dict(zip(methods, cycle(_LINES), strict=False))
    _draw_methods(axes, found, styles)
    if found.seeds > 1:
        figure.suptitle(
            f"means of {found.seeds} seeds; bands from the lowest to the highest, whiskers: "
            "standard deviation"
        )
    _draw_tiers(figure.add_subplot(grid[1, :]), found.scores, found.metric)
    save_figure(figure, path)


def _draw_methods(
    axes: Sequence[Any], found: Summary, styles: Mapping[str, tuple[str, str, str]]
) -> None:
    """Accuracy or perplexity against rounds, traffic and time."""
    target, metric = found.target, found.metric
    lines: Mapping[str, Sequence[Point]] = found.curves
    factor, name = scale_of(metric)
    scales = (("round", "round"), ("megabytes", "traffic of all devices, up and down (MB)"),
              ("seconds", "virtual time (s)"))  # fmt: skip
    for axis, (scale, label) in zip(axes, scales, strict=True):
        for number, (method, points) in enumerate(lines.items()):
            colour, line, marker = styles[method]
            along = [getattr(p, scale) for p in points]
            step = max(1, len(points) // 6)
            axis.plot(
                along, [factor * p.accuracy for p in points], color=colour, linestyle=line,
                marker=marker, markevery=(number % step, step), markersize=5, label=method,
            )  # fmt: skip
            low, high = ([factor * getattr(p, end) for p in points] for end in ("low", "high"))
            axis.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
        ends = [getattr(points[-1], scale) for points in lines.values()]
        if max(ends) > _APART * min(ends) > 0:
            axis.set_xscale("log")
        axis.axhline(factor * target, color="grey", linewidth=0.8, linestyle=(0, (6, 4)), zorder=0)
        axis.set(xlabel=label)
        tidy(axis)
    axes[0].set(ylabel=f"fleet {name}")
    axes[0].text(
        1, factor * target, f"{shown(target, metric)} ", transform=axes[0].get_yaxis_transform(),
        ha="right", va="bottom", fontsize=8, color="dimgrey",
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )  # fmt: skip
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), title="method")


def _draw_tiers(axis: Any, scores: Sequence[Score], metric: Metric) -> None:
    """Groups of bars: a group per method, a bar per tier, device alone before the best path.

    The lower of the two is in front: with perplexity the best path.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    factor, label = scale_of(metric)
    highest = factor * max(s.mean for s in scores) if metric == "perplexity" else 100
    tiers = list(dict.fromkeys(s.tier for s in scores))
    own = [tier for tier in tiers if tier not in ("all", "server")]
    shades = dict(zip(own, colormaps["viridis"](np.linspace(0.15, 0.75, len(own))), strict=True))
    centres, left = {}, 0.0
    for method in dict.fromkeys(s.method for s in scores):
        bars = list(dict.fromkeys(s.tier for s in scores if s.method == method))
        width = max(len(bars), 2)  # room for the name
        centres[method] = left + width / 2
        for number, tier in enumerate(bars):
            paths = {s.path: s for s in scores if (s.method, s.tier) == (method, tier)}
            value = best((s.mean for s in paths.values()), metric)
            highlight = next(s for s in paths.values() if s.mean == value)
            at, colour = left + (width - len(bars)) / 2 + number + 0.5, shades.get(tier, "grey")
            top = factor * highlight.mean
            alone = factor * paths["device_alone"].mean if "device_alone" in paths else None
            tall, short = (top, alone) if metric == "accuracy" else (alone, top)
            for height, alpha in ((tall, 0.35), (short, 1.0)):
                if height is not None:
                    axis.bar(at, height, 0.86, color=colour, alpha=alpha)
            if highlight.deviation is not None:
                axis.errorbar(at, top, factor * highlight.deviation, color="black", linewidth=0.8)
                top += factor * highlight.deviation
            axis.text(
                at, top + highest / 100, f"{factor * highlight.mean:.1f}", ha="center", fontsize=7
            )
        left += width + 0.8
    beside = 0.5 + max(0, 18 - left) / 2  # few bars stay slim
    limits = (-beside, left - 0.8 + beside)
    axis.set(xlim=limits, ylim=(0, 1.09 * highest), ylabel=f"{label} at the end")
    if metric == "accuracy":
        axis.set_yticks(range(0, 101, 20))
    axis.set_xticks(list(centres.values()), [name.replace("-", "-\n", 1) for name in centres])
    axis.tick_params(axis="x", length=0)
    axis.set_axisbelow(True)
    tidy(axis, "y")
    keys = [Patch(color=shades.get(tier, "grey"), label=tier) for tier in tiers]
    names = ["device alone", "best way to answer"]
    full, pale = names if metric == "accuracy" else reversed(names)
    keys += [Patch(color="black", label=f"full: {full}"),
             Patch(color="black", alpha=0.35, label=f"pale: {pale}")]  # fmt: skip
    axis.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5), title="tier")


def draw_curves(
    records: Sequence[RoundRecord], path: Path, reference: tuple[str, float] | None = None
) -> None:
    """Accuracy or perplexity per tier and path over the rounds, and traffic, as a picture.

    What devices say is dashed; the band is from the 10 % quantile to that of 90 % over devices, in
    the last of the ways to answer.
    """
    from matplotlib.figure import Figure

    rounds = [r.round for r in records]
    measured = [r for r in records if r.accuracy]
    asked = [r for r in records if r.device_means]
    tiers = list(measured[-1].accuracy) if measured else []
    tiers += dict.fromkeys(t for r in asked for t in r.device_means if t not in tiers)
    factor, label_of = scale_of(records[-1].metric if records else "accuracy")
    figure = Figure(figsize=(4.2 * (len(tiers) + 1), 3.6), layout="constrained")
    axes = figure.subplots(1, len(tiers) + 1, squeeze=False)[0]
    for axis, tier in zip(axes, tiers, strict=False):
        for number, (name, label) in enumerate(LABELS.items()):
            if measured and name in measured[-1].accuracy.get(tier, {}):
                curve = [factor * r.accuracy[tier][name] for r in measured]
                axis.plot([r.round for r in measured], curve, f"C{number}-", label=label)
            said = [r for r in asked if name in r.device_means.get(tier, {})]
            if said:
                curve = [factor * r.device_means[tier][name] for r in said]
                style, called = f"C{number}--", f"{label}, on devices"
                axis.plot([r.round for r in said], curve, style, label=called)
        _draw_band(axis, asked, tier, factor)
        if reference is not None:
            axis.axhline(factor * reference[1], color="grey", linestyle=":", label=reference[0])
        axis.set(title=tier, xlabel="round", ylabel=label_of)
        tidy(axis)
        axis.legend(loc="lower right" if factor == 100 else "upper right")
    traffic = axes[-1]
    for way, style in (("up", "-"), ("down", "--")):
        total = [getattr(r, way) / 1e6 for r in records]
        traffic.plot(rounds, total, style, label=way)
    traffic.set(title="traffic, cumulative", xlabel="round", ylabel="MB")
    tidy(traffic)
    traffic.legend(loc="upper left")
    save_figure(figure, path)


def _draw_band(axis: Any, asked: Sequence[RoundRecord], tier: str, factor: float) -> None:
    """The spread over devices of the last way to answer that they have evaluated."""
    said = [r for r in asked if tier in r.device_means]
    if not said:
        return
    path = [name for name in LABELS if name in said[-1].device_means[tier]][-1]
    figures = [r.on_devices["tiers"][tier]["paths"][path] for r in said]
    low, high = ([factor * each[end] for each in figures] for end in ("p10", "p90"))
    colour = f"C{list(LABELS).index(path)}"
    axis.fill_between([r.round for r in said], low, high, color=colour, alpha=0.15, linewidth=0)


def draw_cuts(records: Sequence[RoundRecord], path: Path) -> None:
    """The cut of each device over the rounds, as a picture.

    A row per device, a column per round, a colour per cut; white where no update of the device
    counted.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    devices = sorted({device for r in records for device in r.cuts}, key=natural)
    cuts = sorted({cut for r in records for cut in r.cuts.values()})
    number = {cut: i for i, cut in enumerate(cuts)}
    cells = np.array([[number.get(r.cuts.get(d, 0), -1) for r in records] for d in devices])
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.95, 0.1, len(cuts))))
    norm = BoundaryNorm(np.arange(len(cuts) + 1) - 0.5, len(cuts))

    height = float(np.clip(1.2 + 0.22 * len(devices), 2.4, 9))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axis = figure.subplots()
    first, last = records[0].round, records[-1].round
    picture = axis.imshow(
        np.ma.masked_less(cells, 0), colours, norm, aspect="auto", interpolation="nearest",
        extent=(first - 0.5, last + 0.5, len(devices) - 0.5, -0.5),
    )  # fmt: skip
    axis.set(title="cut of each device; white: no update of it counted", xlabel="round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(devices) <= _NAMED:
        axis.set_yticks(range(len(devices)), devices)
        axis.set_yticks(np.arange(0.5, len(devices) - 1), minor=True)
        axis.grid(which="minor", axis="y", color="white", linewidth=1.5)
    else:
        axis.set(ylabel=f"{len(devices)} devices", yticks=[])
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    key = figure.colorbar(picture, ax=axis, label="cut", pad=0.02)
    key.set_ticks(range(len(cuts)), labels=[str(cut) for cut in cuts])
    key.ax.minorticks_off()
    save_figure(figure, path)
