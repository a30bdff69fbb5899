"""A plan as a picture: memory, time and activations over the cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import ConfigError
from edge_sdk.files import why
from export.bundles.tier_table import TierTable
from export.planning.plan import Plan


@dataclass(frozen=True)
class _Panel:
    """A panel of the picture.

    Attributes:
        title: title of the panel.
        unit: unit of the values.
        value: value of a cost and its seconds per epoch; None if there is none.
        limit: limit of a tier for the value; None if there is none.
    """

    title: str
    unit: str
    value: Callable[[dict[str, Any], float | None], float | None]
    limit: Callable[[TierTable], float | None] = lambda table: None


def _panels(rows: list[dict[str, Any]]) -> list[_Panel]:
    timed = any(seconds is not None for row in rows for seconds in row["epoch_s"].values())
    unit = "token" if any(row["tokens"] > 1 for row in rows) else "example"
    return [
        _Panel(
            "memory of a training step",
            "MB",
            lambda cost, _: cost["memory_bytes"] / 1e6,
            lambda table: table.memory_mb,
        ),
        _Panel("local epoch", "s", lambda _, seconds: seconds, lambda table: table.max_epoch_s)
        if timed
        else _Panel("training step", "MFLOP per example", lambda cost, _: cost["flops"] / 1e6),
        _Panel("packed activations", f"bytes per {unit}", lambda cost, _: cost["activation_bytes"]),
    ]


def draw(plan: Plan, path: Path) -> None:
    """Draw memory, time and activations over the cuts, with the tiers' limits and cuts.

    A dot marks the cost of a tier's cut with the heads of the shallower tiers.

    Args:
        plan: plan to draw.
        path: ``.png`` file to write.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError(
            "--picture needs matplotlib: pip install 'cutlayer[hub]', or leave it out"
        ) from error
    content = plan.to_json()
    rows = [row for row in content["cuts"] if "error" not in row]
    panels = _panels(rows)
    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for panel, axis in zip(panels, axes, strict=True):
        for i, (name, table) in enumerate(plan.settings.tiers.items()):
            # lines that coincide have different widths
            color, width = f"C{i % 10}", 1.5 + 1.5 * (len(plan.settings.tiers) - 1 - i)
            points = [
                (row["cut"], value)
                for row in rows
                if (value := panel.value(row, row["epoch_s"].get(name))) is not None
                and name in row["epoch_s"]
            ]
            x, y = zip(*points, strict=True) if points else ((), ())
            axis.plot(x, y, color=color, linewidth=width, alpha=0.7, label=name)
            tier = content["tiers"][name]
            if tier["cost"] is not None and "error" not in tier["cost"]:
                value = panel.value(tier["cost"], tier["epoch_s"])
                if value is not None:
                    axis.plot(tier["cut"], value, "o", color=color, markersize=9, zorder=3)
            limit = panel.limit(table)
            if limit is not None:
                axis.axhline(limit, color=color, linestyle=":")
        axis.set(title=panel.title, xlabel="cut", ylabel=panel.unit, ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        title="line: by cut    dot: chosen, with all heads    dotted: the tier's limit",
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {why(error)}") from error
