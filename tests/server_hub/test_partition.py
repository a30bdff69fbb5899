"""Partitions: every row once, and shares with the right distributions; also the demo's data."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples
from server_hub.demo.digits import partition as demo_partition
from server_hub.reports.plots import draw_partition
from server_hub.simulation.datasets import Dataset, apportion
from server_hub.simulation.digits import CLASSES, load
from server_hub.simulation.partition import Kind, PartitionTable, dirichlet, partition, table_of

DEMO_DEVICES = 6


def numbered(rows: int, seed: int = 0) -> Examples:
    """Return examples that each contain their own number."""
    y = np.random.default_rng(seed).integers(0, CLASSES, rows)
    return Examples(np.arange(rows, dtype=np.float32).reshape(rows, 1), y)


def skew(shares: list[Examples]) -> float:
    """Return how far the devices' class mixes are from the whole: 0 (even) to almost 1."""
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
    shares = demo_partition(data, devices, alpha, seed)
    assert len(shares) == devices
    numbers = np.concatenate([share.x[:, 0] for share in shares])
    assert sorted(numbers.tolist()) == list(range(rows))
    for share in shares:
        np.testing.assert_array_equal(share.y, data.y[share.x[:, 0].astype(int)])


def test_the_demos_devices_all_have_examples() -> None:
    train, _ = load()
    shares = demo_partition(train, DEMO_DEVICES, 1.0, seed=0)
    sizes = [len(share) for share in shares]
    assert sum(sizes) == len(train)
    assert min(sizes) >= 16, f"less than a batch: {sizes}"
    assert len(set(sizes)) > 1, "the devices are meant to be unequal"


def test_a_partition_depends_on_its_seed_alone() -> None:
    data = numbered(500)
    one, same, other = (demo_partition(data, 5, 1.0, seed) for seed in (3, 3, 4))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
    assert any(not np.array_equal(a.x, b.x) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_small_alpha_is_more_skewed_than_large(seed: int) -> None:
    train, _ = load()
    skews = [skew(demo_partition(train, DEMO_DEVICES, alpha, seed)) for alpha in (0.1, 1.0, 100.0)]
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


def labelled(y: Array, domains: Array | None = None) -> Dataset:
    """Return a data set with these labels and arbitrary inputs."""
    examples = Examples(np.zeros((len(y), 1), np.float32), y)
    return Dataset(examples, examples, int(y.max()) + 1, domains=domains)


def texts(lengths: Array) -> Dataset:
    """Return texts of these lengths (numbers of labels that count)."""
    y = np.where(np.arange(max(lengths)) < lengths[:, None], 1, -1)
    examples = Examples(np.where(y > 0, 7, 0), y)
    return Dataset(examples, examples, 256, "tokens")


def balanced(rows: int, classes: int) -> Array:
    return np.random.default_rng(5).permutation(np.arange(rows) % classes)


def assert_complete(shares: list[Array], rows: int) -> None:
    """Check that exactly one client has each row, in order."""
    assert np.concatenate(shares).dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(rows))
    assert all((np.diff(share) > 0).all() for share in shares)
    assert all(len(share) for share in shares)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "shards", "domain", "length"]),
    rows=st.integers(1, 200),
    clients=st.integers(1, 30),
    alpha=st.floats(1e-3, 1e6),
    each=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_row_goes_to_exactly_one_client_or_the_partition_is_refused(
    kind: Kind, rows: int, clients: int, alpha: float, each: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 4, rows)
    data = labelled(rng.integers(0, 7, rows), domain)
    if kind == "length":
        data = texts(rng.integers(1, 20, rows))
    table = PartitionTable(kind, alpha, each, seed)
    shards = clients * each if kind == "shards" else 1
    domains = len(np.unique(domain)) if kind == "domain" else 1
    feasible = clients <= rows and shards <= rows and domains <= clients
    refusal = "without rows" if feasible else "take|needs"
    try:
        shares = partition(data, clients, table)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert re.search(refusal, message)
        assert not feasible or kind in ("dirichlet", "length"), message
        return
    assert feasible
    assert len(shares) == clients
    assert_complete(shares, rows)
    for one, same in zip(shares, partition(data, clients, table), strict=True):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "domain", "length"])
def test_another_seed_gives_another_partition(kind: Kind) -> None:
    data = labelled(balanced(600, 10), np.arange(600) % 3)
    if kind == "length":
        data = texts(np.arange(1, 601) % 40 + 1)
    one, other = (partition(data, 6, PartitionTable(kind, 5.0, seed=seed)) for seed in (1, 2))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_shares_are_equal_and_look_like_the_whole() -> None:
    data = labelled(balanced(5003, 10))
    chi_squares = []
    for seed in range(20):
        shares = partition(data, 20, PartitionTable("iid", seed=seed))
        assert {len(share) for share in shares} == {250, 251}
        counts = table_of(shares, data.train.y, 10)
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        chi_squares.append(((counts - expected) ** 2 / expected).sum())
    # Without regard to labels the statistic has (20 - 1)(10 - 1) degrees of freedom: its mean
    # over 20 partitions is 171 with a deviation of sqrt(2 * 171 / 20) = 4.1.
    assert abs(np.mean(chi_squares) - 171) < 4 * 4.2


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution(alpha: float) -> None:
    clients, rows, classes = 8, 20_000, 1000
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(classes), rows // classes)
    per_class = rows // classes
    shares = []
    for _ in range(4):
        owner = dirichlet(labels, classes, clients, alpha, rng)
        shares.append([np.bincount(o, minlength=clients) for o in owner.reshape(classes, -1)])
    drawn = np.array(shares).reshape(-1, clients) / per_class
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    # Rounding to whole rows adds the variance of two uniform errors of one row's share at most.
    rounding = 2 / 12 / per_class**2
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * np.sqrt(variance / len(drawn)))
    assert 0.92 * variance < drawn.var(0).mean() < 1.08 * variance + rounding


def test_dirichlet_is_what_the_partition_and_the_demo_use() -> None:
    train, _ = load()
    data = Dataset(train, train, CLASSES)
    shares = partition(data, DEMO_DEVICES, PartitionTable("dirichlet", 1.0, seed=3))
    for share, own in zip(shares, demo_partition(train, DEMO_DEVICES, 1.0, 3), strict=True):
        np.testing.assert_array_equal(train.x[share], own.x)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_shards_hold_few_classes(each: int) -> None:
    data = labelled(balanced(1200, 10))
    shares = partition(data, 20, PartitionTable("shards", classes_per_client=each))
    assert_complete(shares, 1200)
    assert {len(share) for share in shares} == {60}
    counts = table_of(shares, data.train.y, 10)
    assert (counts > 0).sum(1).max() <= each  # 120 rows a class are whole shards of 60, 30 and 20
    assert ((counts > 0).sum(1) == each).any()


def test_shards_that_do_not_divide_the_rows_differ_by_one_row_each() -> None:
    data = labelled(balanced(1003, 10))
    shares = partition(data, 17, PartitionTable("shards", classes_per_client=2))
    assert_complete(shares, 1003)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 2
    # A shard of 29 or 30 rows touches two classes of 100 at most.
    assert (table_of(shares, data.train.y, 10) > 0).sum(1).max() <= 4


def test_a_client_has_one_domain_and_clients_follow_the_size_of_domains() -> None:
    domains = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [600, 300, 100]))
    data = labelled(balanced(1000, 10), domains)
    shares = partition(data, 10, PartitionTable("domain"))
    assert_complete(shares, 1000)
    owned = [np.unique(domains[share]).tolist() for share in shares]
    assert sorted(owned) == [[0]] * 6 + [[1]] * 3 + [[4]]
    assert {len(share) for share in shares} == {100}
    assert owned != sorted(owned), "tiers follow the clients' numbers and must not follow domains"


def test_a_small_domain_has_a_client_too() -> None:
    domains = np.repeat([0, 1, 2], [998, 1, 1])
    shares = partition(labelled(balanced(1000, 10), domains), 5, PartitionTable("domain"))
    assert sorted(len(share) for share in shares) == [1, 1, 332, 333, 333]


def test_a_further_client_goes_where_one_would_hold_the_most_rows() -> None:
    domains = np.repeat([0, 1], [500, 260])
    shares = partition(labelled(balanced(760, 10), domains), 4, PartitionTable("domain"))
    assert sorted(len(share) for share in shares) == [130, 130, 250, 250]


def test_length_shares_are_those_of_the_distribution_to_the_row() -> None:
    clients, alpha, seed = 5, 0.7, 11
    lengths = np.random.default_rng(0).permutation(np.arange(1, 104))  # all differ: 103 rows
    data = texts(lengths)
    shares = partition(data, clients, PartitionTable("length", alpha, seed=seed))
    assert_complete(shares, 103)
    classes = np.array_split(np.arange(1, 104), clients)
    counts = np.array(
        [[np.isin(lengths[share], of_class).sum() for of_class in classes] for share in shares]
    )
    np.testing.assert_array_equal(counts.sum(0), [21, 21, 21, 20, 20])
    # The same draws again: each count is the share rounded down, or one more.
    rng = np.random.default_rng(seed)
    rng.permutation(103)
    for label, of_class in enumerate(classes):
        quotas = rng.dirichlet([alpha] * clients) * len(of_class)
        rng.permutation(len(of_class))
        extra = counts[:, label] - np.floor(quotas)
        assert set(extra.tolist()) <= {0, 1}
        fractions = quotas - np.floor(quotas)
        if 0 < extra.sum() < clients:
            assert fractions[extra == 1].min() >= fractions[extra == 0].max()


def test_length_with_small_alpha_is_skewed_and_with_large_is_even() -> None:
    data = texts(np.random.default_rng(0).integers(1, 200, 2000))
    lengths = (data.train.y >= 0).sum(1)
    spread, sizes = {}, {}
    for alpha in (0.1, 1e4):
        means, share_sizes = [], []
        for seed in range(10):
            shares = partition(data, 4, PartitionTable("length", alpha, seed=seed))
            means.append(np.std([lengths[share].mean() for share in shares]))
            share_sizes.append(np.std([len(share) for share in shares]))
        spread[alpha], sizes[alpha] = np.mean(means), np.mean(share_sizes)
    assert spread[0.1] > 25
    assert spread[1e4] < 5
    assert sizes[0.1] > 200
    assert sizes[1e4] < 10


@settings(max_examples=200, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda s: sum(s) > 1e-3),
    total=st.integers(0, 10**6),
)
def test_the_largest_remainders_sum_to_the_total(shares: list[float], total: int) -> None:
    counts = apportion(np.array(shares), total)
    quotas = total * np.array(shares) / sum(shares)
    assert counts.sum() == total
    assert (np.abs(counts - quotas) < 1 + 1e-6).all()


def test_remainders_go_to_the_largest_fractions() -> None:
    assert apportion(np.array([0.47, 0.16, 0.17, 0.2]), 10).tolist() == [5, 1, 2, 2]
    assert apportion(np.ones(3), 2).tolist() == [1, 1, 0]


@pytest.mark.parametrize("alpha", [1e-3, 1e6])
def test_the_bounds_of_alpha_are_within_what_can_be_drawn(alpha: float) -> None:
    rng = np.random.default_rng(0)
    for clients in (1, 2, 200):
        assert np.isfinite(rng.dirichlet([alpha] * clients, 200)).all()


def test_the_table_counts_classes_and_leaves_out_what_is_no_label() -> None:
    shares = [np.array([0, 2]), np.array([1])]
    assert table_of(shares, np.array([1, 0, 1]), 3).tolist() == [[0, 2, 0], [1, 0, 0]]
    tokens = np.array([[0, 2], [1, -1], [2, -1]])
    assert table_of(shares, tokens, 3).tolist() == [[1, 0, 2], [0, 1, 0]]


@pytest.mark.parametrize(
    ("data", "clients", "table", "message"),
    [
        (labelled(np.arange(9)), 0, PartitionTable(), "0 clients; there must be at least 1"),
        (labelled(np.arange(9)), 10, PartitionTable(), "10 clients cannot share 9 rows; take 9"),
        (
            labelled(np.arange(9)),
            5,
            PartitionTable("shards"),
            "5 clients with 2 shards each cannot share 9 rows; .* fewer classes_per_client",
        ),
        (labelled(np.arange(9)), 5, PartitionTable("domain"), "'domain' needs data with domains"),
        (
            labelled(np.arange(9), np.arange(9)),
            5,
            PartitionTable("domain"),
            "5 clients for 9 domains",
        ),
        (labelled(np.arange(9)), 5, PartitionTable("length"), "'length' needs texts"),
        (texts(np.arange(1, 10)), 5, PartitionTable("shards"), "needs one label per row"),
        (texts(np.arange(1, 10)), 5, PartitionTable("dirichlet"), "take 'length' or 'iid'"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(
    data: Dataset, clients: int, table: PartitionTable, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(data, clients, table)


def test_an_empty_client_is_named() -> None:
    data = labelled(np.zeros(40, np.int64))
    with pytest.raises(ConfigError) as caught:
        partition(data, 3, PartitionTable("dirichlet", 0.001))
    owner = dirichlet(data.train.y, 1, 3, 0.001, np.random.default_rng(0))
    one, other = sorted({0, 1, 2} - set(owner.tolist()))
    assert str(caught.value) == (
        f"partition 'dirichlet' leaves clients {one}, {other} without rows; "
        "raise alpha (0.001), take fewer clients (3) or another seed"
    )
    with pytest.raises(ConfigError, match=r"leaves clients (\d+, ){4}\d+ and \d+ more w"):
        partition(data, 30, PartitionTable("dirichlet", 0.001))
    with pytest.raises(ConfigError, match=r"'length' leaves clients .* without rows"):
        partition(texts(np.arange(1, 41)), 20, PartitionTable("length", 0.001))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"classes_per_client": 0}, "classes_per_client is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_table_with_nonsense_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartitionTable(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (6, 10), (200, 100)])
def test_a_partition_is_drawn(clients: int, classes: int, tmp_path: Path) -> None:
    from PIL import Image

    counts = np.random.default_rng(0).integers(0, 9, (clients, classes))
    draw_partition(counts, tmp_path / "partition.png", "title")
    with Image.open(tmp_path / "partition.png") as image:
        assert image.format == "PNG"
        assert 500 < image.width < 1600
        assert 300 < image.height < 1200
