"""The run folder: metrics, the trained model, a report and a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from edge_sdk.bundle import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.prediction import Metric as Metric
from edge_sdk.protocol.tensors import Array

METRICS = "metrics.jsonl"

_NAMED = 36
"""Devices up to which a picture names them all."""

PATHS = {
    "device_alone": "device alone",
    "through_hub": "through hub",
    "ensemble": "ensemble",
}
"""The three ways to answer with one model, and how tables call them."""

LABELS = {**PATHS, "mix": "all bases"}
"""All ways."""


@dataclass(frozen=True)
class RoundRecord:
    """What a round was like; a line of ``metrics.jsonl``.

    Attributes:
        round: its number, from 1 on.
        clock: seconds since the start of the job.
        seconds: how long it took, measuring included.
        devices: devices whose update counted.
        dropped: members that did not deliver, with the reason.
        local_loss: mean loss on the devices, weighted by samples; None in a round that does not
            train their heads.
        local_accuracy: mean accuracy on the devices' own examples, during training; or None.
        trunk_loss: mean loss per row on the trunk; None if no row came.
        trunk_steps: depth-merged steps.
        accuracy: by tier and path on the held-out examples; empty without any. It is what
            ``metric`` says.
        bytes: traffic since the start, by kind of message.
        costs: what a simulation has spent since the start, see :mod:`server_hub.simulation`.
        metric: what ``accuracy`` holds: accuracy, or for a model of tokens perplexity.
        cuts: of the devices that delivered, their cut layers in this round.
        moves: devices that go on with another tier's bundle after this round: ``device``, its
            ``cut``, the one that it goes ``to``, and the ``reason``.
        mixed: with base networks, what ``accuracy`` says of the best so many, mixed.
        order: their numbers, best first.
    """

    round: int
    clock: float
    seconds: float
    devices: int
    dropped: dict[str, str]
    local_loss: float | None
    local_accuracy: float | None
    trunk_loss: float | None
    trunk_steps: int
    accuracy: dict[str, dict[str, float]]
    bytes: dict[str, dict[str, int]]
    costs: dict[str, float] = field(default_factory=dict)
    metric: Metric = "accuracy"
    cuts: dict[str, int] = field(default_factory=dict)
    moves: list[dict[str, Any]] = field(default_factory=list)
    mixed: dict[str, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    @property
    def up(self) -> int:
        """Bytes that devices have sent since the start."""
        return sum(kind["up"] for kind in self.bytes.values())

    @property
    def down(self) -> int:
        """Bytes that devices have got since the start."""
        return sum(kind["down"] for kind in self.bytes.values())


def best(values: Iterable[float], metric: Metric) -> float:
    """The best of some values: the highest accuracy, the lowest perplexity."""
    return max(values) if metric == "accuracy" else min(values)


def shown(value: float, metric: Metric) -> str:
    """A value for people: ``91.4%``, or ``12.38``."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def scale_of(metric: Metric) -> tuple[float, str]:
    """What a picture multiplies values by, and how it calls them."""
    return (100.0, "accuracy (%)") if metric == "accuracy" else (1.0, "perplexity")


def read_records(folder: Path) -> list[RoundRecord]:
    """The rounds of a run, from its ``metrics.jsonl``; a line that was cut off is left out."""
    lines = (folder / METRICS).read_text("utf-8").split("\n")[:-1]
    return [RoundRecord(**json.loads(line)) for line in lines]


class RunFolder:
    """Writes the files of one run.

    Args:
        folder: where.
        keep: rounds of an earlier run there that this one goes on from; None for a new run.
        metric: what the run measures on held-out examples.

    Raises:
        ConfigError: the folder holds another run already, or cannot be written.
    """

    def __init__(self, folder: Path, keep: int | None = None, metric: Metric = "accuracy") -> None:
        self.folder, self.metric = folder, metric
        self.records: list[RoundRecord] = []
        if keep is not None:
            self.records = read_records(folder)[:keep]
            lines = [json.dumps(asdict(record)) + "\n" for record in self.records]
            write_atomically(folder / METRICS, "".join(lines).encode())
        elif (folder / METRICS).exists():
            raise ConfigError(f"{folder} holds a run already; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error

    def append(self, record: RoundRecord) -> RoundRecord:
        """Add a round to ``metrics.jsonl``; returns it with the run's metric."""
        record = replace(record, metric=self.metric)
        self.records.append(record)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        return record

    def save_model(self, state: Mapping[str, Array], tier: str | None) -> Path:
        """Write the whole model as safetensors; ``SplitModel.load`` reads it."""
        path = self.folder / ("model.safetensors" if tier is None else f"model.{tier}.safetensors")
        # safetensors writes arrays as they lie in memory, whatever their order
        whole = {name: np.require(tensor, requirements="C") for name, tensor in state.items()}
        write_atomically(path, save(whole))
        return path

    def write_report(
        self,
        title: str,
        sections: Sequence[str] = (),
        reference: tuple[str, float] | None = None,
    ) -> None:
        """Write ``report.md`` and ``curves.png``; where cuts have moved, ``cuts.png`` too.

        Args:
            title: of the report.
            sections: what comes before the tables.
            reference: name and value of a line to compare the curves with.
        """
        draw_curves(self.records, self.folder / "curves.png", reference)
        parts = [f"# {title}", *sections]
        if self.records:
            parts += [rounds_table(self.records), traffic_table(self.records[-1].bytes)]
        if self.records and self.records[-1].mixed:
            parts.append(mixture_table(self.records[-1]))
        if any(record.moves for record in self.records):
            draw_cuts(self.records, self.folder / "cuts.png")
            parts += [moves_table(self.records), "![cut of each device over the rounds](cuts.png)"]
        parts.append(f"![{self.metric} and traffic over the rounds](curves.png)")
        write_atomically(self.folder / "report.md", "\n\n".join([*parts, ""]).encode())


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int] = (0,)
) -> str:
    """A table in Markdown, the columns ``left`` to the left, the others to the right."""
    rule = ["---" if column in left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def rounds_table(records: Sequence[RoundRecord]) -> str:
    """The rounds, with what the ensemble of each tier comes to."""
    measured = [r for r in records if r.accuracy]
    tiers = list(measured[-1].accuracy) if measured else []
    paths = {tier: list(measured[-1].accuracy[tier])[-1] for tier in tiers}
    columns = [f"{tier}: {LABELS[path]}" for tier, path in paths.items()]
    header = ["round", "devices", "local loss", "trunk loss", *columns]
    rows = [
        [
            str(r.round),
            str(r.devices),
            _loss(r.local_loss),
            _loss(r.trunk_loss),
            *(shown(r.accuracy[t][p], r.metric) if r.accuracy else "" for t, p in paths.items()),
        ]
        for r in records
    ]
    measures = f": {measured[-1].metric}" if measured else ""
    return f"## Rounds{measures}\n\n" + markdown_table(header, rows)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def move_lines(record: RoundRecord) -> list[str]:
    """The moves of cuts after a round, a line each."""
    return [
        f"{m['device']} goes from cut {m['cut']} to {m['to']}: {m['reason']}" for m in record.moves
    ]


def moves_table(records: Sequence[RoundRecord]) -> str:
    """The moves of cuts with their reasons."""
    rows = [
        [m["device"], str(r.round), str(m["cut"]), str(m["to"]), m["reason"].replace("|", "\\|")]
        for r in records
        for m in r.moves
    ]
    header = ["device", "after round", "cut", "to", "reason"]
    return "## Moves of cuts\n\n" + markdown_table(header, rows, left=(0, 4))


def mixture_rows(record: RoundRecord) -> tuple[list[str], list[str]]:
    """Header and row of how good the best so many base networks are, mixed."""
    header = ["bases", *record.mixed]
    return header, [record.metric, *(shown(v, record.metric) for v in record.mixed.values())]


def mixture_table(record: RoundRecord) -> str:
    """Mixtures of base networks after a round."""
    header, row = mixture_rows(record)
    order = ", ".join(map(str, record.order))
    return f"## Mixtures\n\n{markdown_table(header, [row])}\n\nBest first: {order}."


def traffic_table(traffic: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes by kind of message."""
    kinds = sorted(traffic, key=lambda kind: -sum(traffic[kind].values()))
    rows = [
        [kind, megabytes(traffic[kind]["up"]), megabytes(traffic[kind]["down"])] for kind in kinds
    ]
    return "## Traffic in MB\n\n" + markdown_table(["message", "up", "down"], rows)


def megabytes(size: int) -> str:
    """Bytes as millions of bytes, for tables."""
    return f"{size / 1e6:.3f}"


def draw_curves(
    records: Sequence[RoundRecord], path: Path, reference: tuple[str, float] | None = None
) -> None:
    """Accuracy or perplexity per tier and path over the rounds, and traffic, as a picture."""
    from matplotlib.figure import Figure

    rounds = [r.round for r in records]
    measured = [r for r in records if r.accuracy]
    tiers = list(measured[-1].accuracy) if measured else []
    factor, label_of = scale_of(measured[-1].metric if measured else "accuracy")
    figure = Figure(figsize=(4.2 * (len(tiers) + 1), 3.6), layout="constrained")
    axes = figure.subplots(1, len(tiers) + 1, squeeze=False)[0]
    for axis, tier in zip(axes, tiers, strict=False):
        for name, label in LABELS.items():
            if name in measured[-1].accuracy[tier]:
                curve = [factor * r.accuracy[tier][name] for r in measured]
                axis.plot([r.round for r in measured], curve, label=label)
        if reference is not None:
            axis.axhline(factor * reference[1], color="grey", linestyle=":", label=reference[0])
        axis.set(title=tier, xlabel="round", ylabel=label_of)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right" if factor == 100 else "upper right")
    traffic = axes[-1]
    for way, style in (("up", "-"), ("down", "--")):
        total = [getattr(r, way) / 1e6 for r in records]
        traffic.plot(rounds, total, style, label=way)
    traffic.set(title="traffic, cumulative", xlabel="round", ylabel="MB")
    traffic.grid(alpha=0.3)
    traffic.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def draw_cuts(records: Sequence[RoundRecord], path: Path) -> None:
    """The cut of each device over the rounds, as a picture.

    A row per device, a column per round, a colour per cut; white where the device's update did
    not count.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    devices = sorted({device for r in records for device in r.cuts}, key=_natural)
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
    figure.savefig(path, dpi=110)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``phone-2`` before ``phone-10``."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
