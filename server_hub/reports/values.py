"""Measured values as text: accuracy, perplexity, sizes, means over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

from edge_sdk.inference.metrics import Metric

PATHS = {
    "device_alone": "device alone",
    "through_hub": "through hub",
    "ensemble": "ensemble",
}
"""The three ways to answer with one model, and their names in tables."""

LABELS = {**PATHS, "mix": "all bases"}
"""All ways to answer, and their names in tables."""


def best(values: Iterable[float], metric: Metric) -> float:
    """The best of some values: the highest accuracy, the lowest perplexity."""
    return max(values) if metric == "accuracy" else min(values)


def shown(value: float, metric: Metric) -> str:
    """A measured value with its unit: ``91.4%``, or ``12.38``."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def scale_of(metric: Metric) -> tuple[float, str]:
    """The factor from a measured value to a picture's axis, and the label of that axis."""
    return (100.0, "accuracy (%)") if metric == "accuracy" else (1.0, "perplexity")


def three_digits(value: float) -> str:
    """A number with about three digits, so that small and large ones fit one column."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def spread(values: Sequence[float], show: Callable[[float], str] = three_digits) -> str:
    """The mean of one or more values; with several, ``±`` their sample standard deviation."""
    deviation = f" ± {show(stdev(values))}" if len(values) > 1 else ""
    return show(fmean(values)) + deviation


def percent(value: float) -> str:
    """A share as a number of percent, without the sign: ``91.4``."""
    return f"{100 * value:.1f}"


def megabytes(size: int) -> str:
    """Bytes as millions of bytes."""
    return f"{size / 1e6:.3f}"


def bases(count: int) -> str:
    """A number of base networks: ``1 base``, ``4 bases``."""
    return f"{count} base" if count == 1 else f"{count} bases"
