"""Accuracy and perplexity: against formulas in float64, in batches, and in edge cases."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.inference import metrics
from edge_sdk.inference.metrics import Tally, mean_metric, metric_of, softmax
from edge_sdk.protocol.tensors import Array


def reference(logits: Array, y: Array) -> float:
    """Return the perplexity of the mean of the heads' softmax, in float64 and without batches."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).mean(0)
    counted = y >= 0
    return float(np.exp(-np.log(p[counted, y[counted]]).mean()))


@settings(deadline=None)
@given(
    heads=st.integers(1, 3),
    rows=st.integers(1, 5),
    positions=st.integers(1, 6),
    vocabulary=st.integers(2, 40),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    chunk=st.sampled_from([1, 50, 2**18]),
    seed=st.integers(0, 99),
)
def test_perplexity_is_that_of_the_mean_of_the_heads(
    heads: int, rows: int, positions: int, vocabulary: int, scale: float,
    dtype: type, chunk: int, seed: int,
) -> None:  # fmt: skip
    """The result does not depend on the number of positions per step, and inputs do not change."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((heads, rows, positions, vocabulary))).astype(dtype)
    y = rng.integers(-1, vocabulary, (rows, positions))
    y[0, 0] = 0
    kept = logits.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK", chunk)
        tally = Tally("tokens")
        tally.add(logits, y)
    assert tally.labels == (y >= 0).sum()
    assert tally.value == pytest.approx(reference(logits, y), rel=1e-5)
    assert np.array_equal(logits, kept)


@given(st.integers(1, 3), st.integers(1, 30), st.integers(2, 9), st.integers(0, 99))
def test_accuracy_is_that_of_the_mean_of_the_heads(
    heads: int, rows: int, classes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((heads, rows, classes)).astype(np.float32)
    y = rng.integers(0, classes, rows)
    tally = Tally("classes")
    tally.add(logits, y)
    assert tally.labels == rows
    assert tally.value == (softmax(logits).mean(0).argmax(1) == y).mean()


@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_batches_add_up(task: str) -> None:
    """The tally of batches equals the tally of all rows, weighted by labels."""
    rng = np.random.default_rng(0)
    shape = (7,) if task == "classes" else (7, 3)
    logits = rng.standard_normal((2, *shape, 5)).astype(np.float32)
    y = rng.integers(0 if task == "classes" else -1, 5, shape)
    whole, parts = Tally(task), Tally(task)
    whole.add(logits, y)
    for some in (slice(0, 2), slice(2, 7)):
        parts.add(logits[:, some], y[some])
    assert parts.labels == whole.labels
    assert parts.value == pytest.approx(whole.value, rel=1e-12)


def test_large_logits_overflow_nothing() -> None:
    """A confident wrong answer costs its large logit; the reported perplexity has a maximum."""
    logits = np.array([[[[0.0, 900.0]]]], np.float32)
    tally = Tally("tokens")
    tally.add(logits, np.array([[0]]))
    assert tally.value == math.exp(700.0)
    tally = Tally("tokens")
    tally.add(logits, np.array([[1]]))
    assert tally.value == 1.0


def test_memory_does_not_grow_with_what_is_measured() -> None:
    """The memory beside the logits is a few MB; the positions that count are not copied at once."""
    logits = np.zeros((1, 4, 64, 50_257), np.float32)
    y = np.zeros((4, 64), np.int64)
    tally = Tally("tokens")
    tracemalloc.start()
    tally.add(logits, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert tally.value == pytest.approx(50_257, rel=1e-6)


def test_nothing_counted_has_no_value() -> None:
    with pytest.raises(ZeroDivisionError):
        _ = Tally("classes").value


def test_the_metric_of_a_task() -> None:
    assert metric_of("classes") == "accuracy"
    assert metric_of("tokens") == "perplexity"


def test_means_are_weighted() -> None:
    assert mean_metric([(1.0, 1), (4.0, 2)]) == 3.0
    assert mean_metric([]) is None


def test_softmax_is_in_float64() -> None:
    p = softmax(np.array([[1e4, 1e4 - 1.0]], np.float32))
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1.0, abs=1e-15)
    assert p[0, 0] == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-12)
