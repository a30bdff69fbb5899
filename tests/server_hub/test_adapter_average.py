"""Averages of adapters as products, against a dense SVD of the averaged matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.protocol.tensors import Array
from export.adapters_lora.low_rank import AdapterCopy, adapter_pairs, average, reduce


def drawn(
    seed: int, outputs: int, inputs: int, ranks: list[int], weights: list[float] | None = None
) -> list[AdapterCopy]:
    """Draw random copies, with A as PEFT draws it."""
    rng = np.random.default_rng(seed)
    bound = inputs**-0.5
    return [
        AdapterCopy(
            rng.standard_normal((outputs, rank)),
            rng.uniform(-bound, bound, (rank, inputs)),
            rng.uniform(0.5, 4),
            weight,
        )
        for rank, weight in zip(ranks, weights or [1.0] * len(ranks), strict=True)
    ]


def dense(copies: list[AdapterCopy]) -> Array:
    """Return the mean of the products as a matrix."""
    total = sum(copy.weight for copy in copies)
    return sum((c.weight / total * c.scale * c.B @ c.A for c in copies), np.zeros(()))


def truncated(matrix: Array, rank: int) -> Array:
    """Return the nearest matrix of a rank (Eckart and Young)."""
    U, sizes, V = np.linalg.svd(matrix)
    return (U[:, :rank] * sizes[:rank]) @ V[:rank]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[AdapterCopy], int, float]:
    """Copies of a module, a rank and a scale; the rank is often above the rank of all copies."""
    outputs, inputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = st.integers(1, min(outputs, inputs))
    ranks = draw(st.lists(rank, min_size=1, max_size=4) | rank.map(lambda r: [r] * 3))
    weights = [draw(st.floats(1e-3, 1e5)) for _ in ranks]
    copies = drawn(draw(st.integers(0, 2**32 - 1)), outputs, inputs, ranks, weights)
    return copies, draw(rank), draw(st.floats(0.1, 10))


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_product_is_the_truncated_mean_of_the_products(
    case: tuple[list[AdapterCopy], int, float],
) -> None:
    copies, rank, scale = case
    mean = dense(copies)
    B, A = average(copies, rank, scale)
    assert B.shape == (len(mean), rank)
    assert A.shape == (rank, mean.shape[1])
    # Compare the error, not the matrix: with two close singular values the matrix is not unique.
    sizes = np.linalg.svd(mean, compute_uv=False)
    size = sizes[0] + 1e-300
    error = np.linalg.norm(mean - scale * B @ A)
    assert error == pytest.approx(np.linalg.norm(sizes[rank:]), abs=1e-9 * size)
    if rank < len(sizes) and sizes[rank - 1] - sizes[rank] > 1e-3 * size:
        np.testing.assert_allclose(scale * B @ A, truncated(mean, rank), atol=1e-8 * size)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_no_row_of_A_is_zero(case: tuple[list[AdapterCopy], int, float]) -> None:
    copies, rank, scale = case
    still = [copy._replace(B=0 * copy.B) for copy in copies]
    for group in (copies, still):
        A = average(group, rank, scale)[1]
        assert np.linalg.matrix_rank(A, tol=1e-9) == rank


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("rank_of_B", [0, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_equal_copies_come_back_as_they_were(
    dtype: type, copies: int, rank_of_B: int, seed: int
) -> None:
    """This also holds if B is zero, as at the start, or has a lower rank than A."""
    B, A, scale, _ = drawn(seed, 12, 20, [4])[0]
    B[:, rank_of_B:] = 0
    B, A = B.astype(dtype), A.astype(dtype)
    given = [AdapterCopy(B, A, scale, weight) for weight in (3.0, 0.25, 11.0)[:copies]]
    new_B, new_A = average(given, 4, scale)
    assert (new_B.dtype, new_A.dtype) == (dtype, dtype)
    rounding = 1e-5 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(new_A, A, atol=rounding)
    np.testing.assert_allclose(new_B, B, atol=rounding)


def test_the_scale_moves_into_B() -> None:
    copy = drawn(0, 7, 9, [3])[0]
    B, A = average([copy], 3, 2 * copy.scale)
    np.testing.assert_allclose(A, copy.A, atol=1e-12)
    np.testing.assert_allclose(2 * B, copy.B, atol=1e-12)


def test_where_every_B_is_zero_the_means_of_A_stay() -> None:
    copies = [copy._replace(B=0 * copy.B) for copy in drawn(1, 8, 10, [3, 3], [1.0, 3.0])]
    B, A = average(copies, 3, 1.0)
    assert not B.any()
    np.testing.assert_allclose(A, (copies[0].A + 3 * copies[1].A) / 4, atol=1e-12)


def test_copies_that_moved_little_keep_nearly_their_basis() -> None:
    start = drawn(2, 12, 20, [4])[0]
    rng = np.random.default_rng(0)
    copies = [
        AdapterCopy(
            start.B + 1e-3 * rng.standard_normal(start.B.shape),
            start.A + 1e-3 * rng.standard_normal(start.A.shape),
            start.scale,
            1.0,
        )
        for _ in range(5)
    ]
    B, A = average(copies, 4, start.scale)
    np.testing.assert_allclose(A, np.mean([c.A for c in copies], 0), atol=1e-3)
    np.testing.assert_allclose(B, np.mean([c.B for c in copies], 0), atol=1e-2)


def test_a_basis_that_cancels_out_is_replaced() -> None:
    """A, B and -A, -B are the same adapter, and the mean of the two A is zero."""
    B, A, scale, weight = drawn(3, 8, 10, [3])[0]
    copies = [AdapterCopy(B, A, scale, weight), AdapterCopy(-B, -A, scale, weight)]
    new_B, new_A = average(copies, 3, scale)
    np.testing.assert_allclose(new_B @ new_A, B @ A, atol=1e-12)
    np.testing.assert_allclose(new_A @ new_A.T, np.eye(3) / 3, atol=1e-12)


def test_averaging_A_and_B_apart_is_biased() -> None:
    copies = [copy._replace(scale=1.0) for copy in drawn(4, 16, 16, [2, 2, 2])]
    mean = dense(copies)
    apart = np.mean([c.B for c in copies], 0) @ np.mean([c.A for c in copies], 0)
    B, A = average(copies, 2, 1.0)
    best = np.linalg.norm(mean - truncated(mean, 2))
    assert np.linalg.norm(mean - B @ A) == pytest.approx(best)
    assert np.linalg.norm(mean - apart) > 1.2 * best
    whole_B, whole_A = average(copies, 6, 1.0)
    np.testing.assert_allclose(whole_B @ whole_A, mean, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_a_lower_rank_keeps_the_leading_part(seed: int, rank: int, lower: int) -> None:
    lower = min(rank, lower)
    B, A, _, _ = drawn(seed, 9, 11, [rank])[0]
    new_B, new_A = reduce(B, A, lower)
    assert (new_B.shape, new_A.shape) == ((9, lower), (lower, 11))
    sizes = np.linalg.svd(B @ A, compute_uv=False)
    error = np.linalg.norm(B @ A - new_B @ new_A)
    assert error == pytest.approx(np.linalg.norm(sizes[lower:]), abs=1e-9 * sizes[0])


@pytest.mark.parametrize("start", ["trained", "B zero", "A degenerate", "A zero"])
def test_a_higher_rank_adds_to_what_is_there(start: str) -> None:
    B, A, _, _ = drawn(5, 9, 8, [3])[0]
    if start == "B zero":
        B[:] = 0
    elif start == "A degenerate":
        A[1] = A[0]
    elif start == "A zero":
        A[:] = 0
    for rank in (3, 5, 8):
        new_B, new_A = reduce(B, A, rank)
        np.testing.assert_array_equal(new_A[:3], A)
        np.testing.assert_array_equal(new_B[:, :3], B)
        assert not new_B[:, 3:].any()
        added = new_A[3:]
        np.testing.assert_allclose(added @ added.T, np.eye(rank - 3) / 3, atol=1e-12)
        np.testing.assert_allclose(added @ A.T, 0, atol=1e-12)


def test_where_B_is_zero_a_lower_rank_keeps_rows_of_A() -> None:
    B, A, _, _ = drawn(6, 9, 8, [4])[0]
    new_B, new_A = reduce(0 * B, A, 2)
    assert not new_B.any()
    np.testing.assert_allclose(new_A @ new_A.T, np.eye(2) / 3, atol=1e-12)
    projected = new_A @ np.linalg.pinv(A) @ A
    np.testing.assert_allclose(projected, new_A, atol=1e-12)


def test_pairs_are_those_of_adapters_not_of_slots() -> None:
    stem = "block.3.layer.attn.c_attn.lora_"
    A, B = f"{stem}A.default.weight", f"{stem}B.default.weight"
    other = A.replace("3", "11"), B.replace("3", "11")
    names = [B, A, f"momentum/{A}", f"momentum/{B}", "aux.2.norm.weight", *other, "steps"]
    assert adapter_pairs(names) == [(A, B), other]
    with pytest.raises(ValueError, match="comes alone"):
        adapter_pairs([B])


@pytest.mark.parametrize(
    ("shapes", "weight", "rank", "message"),
    [
        ([], 1.0, 1, "no copies"),
        ([((4, 2), (3, 5))], 1.0, 1, r"B is \(4, 2\) and A \(3, 5\)"),
        ([((4, 2), (2, 5)), ((3, 2), (2, 5))], 1.0, 1, r"must be \(4, rank\) and \(rank, 5\)"),
        ([((4, 2), (2, 5))], 0.0, 2, "weight of a copy is 0.0; it must be above 0"),
        ([((4, 2), (2, 5))], 1.0, 5, "rank 5 does not fit a module that is 4 x 5"),
        ([((4, 2), (2, 5))], 1.0, 0, "rank 0 does not fit"),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    shapes: list[tuple[tuple[int, int], tuple[int, int]]], weight: float, rank: int, message: str
) -> None:
    copies = [AdapterCopy(np.ones(b), np.ones(a), 1.0, weight) for b, a in shapes]
    with pytest.raises(ValueError, match=message):
        average(copies, rank, 1.0)
