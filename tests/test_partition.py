"""The demo's data: a fixed split, and shares for devices that are unequal but complete."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.data import Examples
from server_hub.demo.digits import CLASSES, load, partition

DEMO_DEVICES = 6


def numbered(rows: int, seed: int = 0) -> Examples:
    """Examples that can be told apart: each holds its own number."""
    y = np.random.default_rng(seed).integers(0, CLASSES, rows)
    return Examples(np.arange(rows, dtype=np.float32).reshape(rows, 1), y)


def skew(shares: list[Examples]) -> float:
    """How far the devices' mixes of classes are from the whole, from 0 (even) to almost 1."""
    counts = np.array([np.bincount(share.y, minlength=CLASSES) for share in shares], float)
    whole = counts.sum(0) / counts.sum()
    own = [c / c.sum() for c in counts if c.sum()]
    return float(np.mean([np.abs(mix - whole).sum() / 2 for mix in own]))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 300),
    devices=st.integers(1, 12),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 100),
)
def test_every_example_goes_to_exactly_one_device(
    rows: int, devices: int, alpha: float, seed: int
) -> None:
    data = numbered(rows, seed)
    shares = partition(data, devices, alpha, seed)
    assert len(shares) == devices
    numbers = np.concatenate([share.x[:, 0] for share in shares])
    assert sorted(numbers.tolist()) == list(range(rows))
    for share in shares:
        np.testing.assert_array_equal(share.y, data.y[share.x[:, 0].astype(int)])


def test_the_demos_devices_all_have_examples() -> None:
    train, _ = load()
    shares = partition(train, DEMO_DEVICES, 1.0, seed=0)
    sizes = [len(share) for share in shares]
    assert sum(sizes) == len(train)
    assert min(sizes) >= 16, f"less than a batch: {sizes}"
    assert len(set(sizes)) > 1, "the devices are meant to be unequal"


def test_a_partition_depends_on_its_seed_alone() -> None:
    data = numbered(500)
    one, same, other = (partition(data, 5, 1.0, seed) for seed in (3, 3, 4))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
    assert any(not np.array_equal(a.x, b.x) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_small_alpha_is_more_skewed_than_large(seed: int) -> None:
    train, _ = load()
    skews = [skew(partition(train, DEMO_DEVICES, alpha, seed)) for alpha in (0.1, 1.0, 100.0)]
    assert skews[0] > skews[1] > skews[2]
    assert skews[0] > 0.4
    assert skews[2] < 0.1


def test_the_split_is_the_same_every_time() -> None:
    for one, other in zip(load(), load(), strict=True):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)


def test_the_split_covers_the_digits_once() -> None:
    from sklearn.datasets import load_digits

    train, held_out = load()
    assert (len(train), len(held_out)) == (1438, 359)
    for part in (train, held_out):
        assert part.x.shape[1:] == (1, 8, 8)
        assert part.x.dtype == np.float32
        assert 0.0 <= part.x.min() < part.x.max() <= 1.0
        assert part.y.dtype == np.int64
        assert set(part.y.tolist()) == set(range(CLASSES))

    def rows(images: np.ndarray, labels: np.ndarray) -> list[tuple[float, ...]]:
        flat = images.reshape(len(images), -1)
        return sorted((*row, label) for row, label in zip(flat.tolist(), labels, strict=True))

    x, y = load_digits(return_X_y=True)
    both = [np.concatenate(pair) for pair in zip((train.x, train.y), (held_out.x, held_out.y),
                                                 strict=True)]  # fmt: skip
    assert rows(both[0] * 16, both[1]) == rows(x, y), "each digit is in one part, and in one only"
