"""Pictures of a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_sdk.protocol.tensors import Array

WRITTEN = 24
"""Clients or classes up to which the cells hold their numbers."""


def draw_partition(counts: Array, path: Path, title: str) -> None:
    """Who holds what: rows of each client, and how many of each class.

    A heat map, one column per client and one row per class, under a bar per client. Colours go
    with the square root, so that a class of which a client has little is still to be seen; white
    is none at all.

    Args:
        counts: (clients, classes) rows.
        path: ``.png`` to write.
        title: what the partition is.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients, classes = counts.shape
    written = clients <= WRITTEN and classes <= WRITTEN
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
    figure.savefig(path, dpi=110)
