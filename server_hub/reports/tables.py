"""Runs as tables."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from edge_sdk.inference.metrics import Metric as Metric
from server_hub.storage.run_folder import RoundRecord

PATHS = {
    "device_alone": "device alone",
    "through_hub": "through hub",
    "ensemble": "ensemble",
}
"""The three ways to answer with one model, and how tables call them."""


LABELS = {**PATHS, "mix": "all bases"}
"""All ways."""


def best(values: Iterable[float], metric: Metric) -> float:
    """The best of some values: the highest accuracy, the lowest perplexity."""
    return max(values) if metric == "accuracy" else min(values)


def shown(value: float, metric: Metric) -> str:
    """A value for people: ``91.4%``, or ``12.38``."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def scale_of(metric: Metric) -> tuple[float, str]:
    """What a picture multiplies values by, and how it calls them."""
    return (100.0, "accuracy (%)") if metric == "accuracy" else (1.0, "perplexity")


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
