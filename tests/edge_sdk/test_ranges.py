"""Examples are checked against the ranges of the manifest; errors name the row and the value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle.ranges import MAX_POSITIONS, Ranges
from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import TensorSpec

IMAGES = Ranges(TensorSpec("x", "float32", ("batch", 2, 2)), "classes", 3, (), MAX_POSITIONS)
TEXTS = Ranges(TensorSpec("x", "int64", ("batch", "seq")), "tokens", 7, (6,), 5)
COLUMNS = Ranges(TensorSpec("x", "int32", ("batch", 2)), "classes", 3, (4, 9), MAX_POSITIONS)


def images(value: Any = 0.5, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Three images, the second of which has a value."""
    x = np.zeros((3, 2, 2), dtype)
    x[1, 0, 1] = value
    return x


def texts(value: int = 1, dtype: Any = np.int64) -> np.ndarray[Any, Any]:
    """Three texts of four tokens, the last of which has a value."""
    x = np.ones((3, 4), dtype)
    x[2, 3] = value
    return x


Y = np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("ranges", "x", "y", "says"),
    [
        (IMAGES, np.float32(3), Y, "x has shape [], the model takes ['batch', 2, 2]"),
        (IMAGES, images()[:0], Y[:0], "x has shape [0, 2, 2]"),
        (IMAGES, images()[:, :1], Y, "x has shape [3, 1, 2]"),
        (IMAGES, images(np.nan), Y, "row 1 of x at 0, 1 is nan"),
        (IMAGES, images(-np.inf), Y, "row 1 of x at 0, 1 is -inf"),
        (IMAGES, images(1e300, np.float64), Y, "row 1 of x at 0, 1 is 1e+300"),
        (IMAGES, images(1, object), Y, "x is object, the model takes float32"),
        (IMAGES, images(1, "U3"), Y, "x is <U3, the model takes float32"),
        (IMAGES, images(1j, complex), Y, "x is complex128, the model takes float32"),
        (IMAGES, images(), np.int64(1), "y has shape [] and dtype int64"),
        (IMAGES, images(), Y[:2], "y has shape [2]"),
        (IMAGES, images(), Y.astype(float), "dtype float64; it must hold integer labels"),
        (IMAGES, images(), Y.astype(object), "dtype object"),
        (IMAGES, images(), Y + 1, "row 2 of y is the label 3; the model has the classes 0 to 2"),
        (IMAGES, images(), Y - 1, "row 0 of y is the label -1; the model has the classes 0 to 2"),
        (IMAGES, images(), np.uint64([0, 1, 2**64 - 1]), "row 2 of y is the label 18446744"),
        (TEXTS, texts(-1), texts(), "row 2 of x at 3 is -1; the model takes 0 to 6"),
        (TEXTS, texts(-100), texts(), "row 2 of x at 3 is -100"),
        (TEXTS, texts(7), texts(), "row 2 of x at 3 is 7; the model takes 0 to 6"),
        (TEXTS, texts(2**63, np.uint64), texts(), "row 2 of x at 3 is 9223372036854775808"),
        (TEXTS, texts(dtype=np.float32), texts(), "x is float32, the model takes int64"),
        (TEXTS, np.ones((1, 6), int), np.ones((1, 6), int), "texts of 6 tokens; the model takes 5"),
        (TEXTS, texts(), texts(-100), "row 2 of y at 3 is the label -100; the model has the "
         "classes 0 to 6; -1 marks positions that do not count"),
        (TEXTS, texts(), texts(7), "row 2 of y at 3 is the label 7"),
        (TEXTS, texts(), np.full((3, 4), -1), "no position has a label: all of y is -1"),
        (TEXTS, texts(), Y, "y has shape [3]"),
        (COLUMNS, np.array([[4, 9], [4, 9], [5, 9]]), Y, "row 2 of x at 0 is 5; the model takes 0 "
         "to 4"),
        (COLUMNS, np.array([[4, 9], [4, 10], [4, 9]]), Y, "row 1 of x at 1 is 10; the model takes "
         "0 to 9"),
    ],
)  # fmt: skip
def test_wrong_examples_are_named(ranges: Ranges, x: Any, y: Any, says: str) -> None:
    """One sentence has the row and the value, before anything is cast."""
    with pytest.raises(DataError) as caught:
        ranges.fit(np.asarray(x), np.asarray(y))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranges", "x", "y"),
    [
        (IMAGES, images(), Y),
        (IMAGES, images(3, np.uint8), Y.astype(np.uint8)),
        (IMAGES, images(3.0, np.float64), Y * 0),  # fewer classes than the model has
        (TEXTS, texts(6), texts(-1)),
        (TEXTS, texts(6, np.uint8), texts(0)),
        (COLUMNS, np.array([[4, 9], [0, 0], [1, 5]]), Y),
    ],
)
def test_right_examples_get_the_dtypes_of_the_graphs(ranges: Ranges, x: Any, y: Any) -> None:
    """Values stay the same."""
    fitted_x, fitted_y = ranges.fit(x, y)
    assert (fitted_x.dtype.name, fitted_y.dtype.name) == (ranges.x.dtype, "int64")
    assert (fitted_x == x).all()
    assert (fitted_y == y).all()


def test_integers_without_a_range_must_fit_the_dtype() -> None:
    """A cast that changes a value is refused."""
    counts = Ranges(TensorSpec("x", "int8", ("batch", 2)), "classes", 3, (), MAX_POSITIONS)
    x = np.array([[-128, 127], [0, 128], [0, 0]])
    with pytest.raises(DataError, match="row 1 of x at 1 is 128; the model takes -128 to 127"):
        counts.fit(x, Y)
    assert counts.fit(x.clip(-128, 127), Y)[0].dtype == np.int8
