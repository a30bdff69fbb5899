"""How good answers are: accuracy and perplexity of the mean of some heads' softmax, in numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from edge_sdk.protocol.tensors import Array

Metric = Literal["accuracy", "perplexity"]
"""What is measured on held-out examples: a fraction, higher is better; or perplexity, lower is."""

Task = Literal["classes", "tokens"]
"""What a label says: the class of an example, or the token at each position of a text."""

LARGEST_LOSS = 700.0
"""Largest mean cross-entropy that is reported: beyond it the perplexity overflows float64."""

_CHUNK = 2**18
"""Logits that are worked on at a time: about a MB, whatever the vocabulary."""


def metric_of(task: str) -> Metric:
    """What is measured for a task."""
    return "perplexity" if task == "tokens" else "accuracy"


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    weights: Array = np.exp(shifted)
    total: Array = weights / weights.sum(-1, keepdims=True)
    return total


def mean_metric(values: Iterable[tuple[float, float]]) -> float | None:
    """Weighted mean of a metric.

    Args:
        values: value and weight of each device that reported the metric.

    Returns:
        The mean; None if no device reported it.
    """
    pairs = list(values)
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if pairs else None


class Tally:
    """Accuracy for classes, perplexity for tokens, over any number of batches.

    An answer is the mean of the softmax of some heads. Perplexity is the exponential of the mean
    cross-entropy of the answers over the labels that count, at most ``exp(700)``.

    Args:
        task: what labels say.

    Attributes:
        labels: number of labels that were counted.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._sum = 0.0  # correct answers, or cross-entropy
        self.labels = 0

    def add(self, logits: Array, y: Array) -> None:
        """Count the answers to a batch.

        Args:
            logits: (heads, rows, classes), or (heads, rows, positions, vocabulary); floats.
            y: labels (rows,); or (rows, positions), where -1 does not count.
        """
        if self._task == "classes":
            self._sum += int((softmax(logits).mean(0).argmax(-1) == y).sum())
            self.labels += len(y)
            return
        counted = np.flatnonzero(y.reshape(-1) >= 0)
        labels = y.reshape(-1)[counted]
        log_p_HN = np.stack(
            [_log_probabilities(z.reshape(-1, z.shape[-1]), counted, labels) for z in logits]
        )
        losses_N = math.log(len(logits)) - np.logaddexp.reduce(log_p_HN, axis=0)
        self._sum += float(losses_N.sum())
        self.labels += len(labels)

    @property
    def mean(self) -> float:
        """Mean over the labels: the accuracy; for tokens the cross-entropy, at most 700.

        Raises:
            ZeroDivisionError: no label was counted.
        """
        return min(self._sum / self.labels, LARGEST_LOSS)

    @property
    def value(self) -> float:
        """The metric over everything that was counted; raises as :attr:`mean` does."""
        return value_of(self._task, self.mean)


def value_of(task: str, mean: float) -> float:
    """The metric of a :attr:`Tally.mean`: accuracy, or perplexity."""
    return mean if task == "classes" else math.exp(mean)


def _log_probabilities(z_NV: Array, positions: Array, labels: Array) -> Array:
    """Logarithm of the softmax at the label, float64 (positions,).

    Args:
        z_NV: logits of one head (all positions, vocabulary).
        positions: numbers of the positions to look at.
        labels: the label at each of them.
    """
    result = np.empty(len(positions))
    size = max(_CHUNK // z_NV.shape[-1], 1)
    for start in range(0, len(positions), size):
        some = slice(start, start + size)
        z = z_NV[positions[some]]  # a copy, which is overwritten below
        if z.dtype == np.float16:
            z = z.astype(np.float32)
        largest = z.max(-1)
        at_label = z[np.arange(len(z)), labels[some]].astype(np.float64)
        z -= largest[:, None]
        np.exp(z, out=z)
        result[some] = at_label - largest - np.log(z.sum(-1, dtype=np.float64))
    return result
