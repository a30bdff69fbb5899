"""Data of a simulation: every format, read from files made here, and every error."""

from __future__ import annotations

import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_sdk.config import build
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.protocol.tensors import Array
from server_hub.simulation import digits
from server_hub.simulation.datasets import DataTable, load_dataset, stratified
from server_hub.simulation.formats import cut_text

rng = np.random.default_rng(0)


def pixels(*shape: int) -> Array:
    """Return random images."""
    return rng.integers(0, 256, shape, np.uint8)


def save(path: Path, **arrays: Any) -> DataTable:
    np.savez(path, **arrays)
    return DataTable(str(path))


def standardised(x: Array, train: Array) -> Array:
    """Return images (n, c, h, w) standardised by the plain definition."""
    x, train = x / 255, train / 255
    axes = (0, 2, 3)
    result: Array = (x - train.mean(axes, keepdims=True)) / train.std(axes, keepdims=True)
    return result


def save_pictures(folder: Path, images: Array, name: str = "{}.png") -> Array:
    """Write images as files, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / name.format(i))
    return images


# The table


def test_the_table_is_built_from_toml() -> None:
    raw = {"source": "x.npz", "held_out": 0.5, "train": 7, "length": 16}
    assert build(DataTable, raw, "[data]") == DataTable("x.npz", 0.5, 7, None, 16)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"source": "digits", "held_out": 0.0}, "held_out is 0.0; it must be between 0 and 1"),
        ({"source": "digits", "held_out": 1}, "held_out is 1.0"),
        ({"source": "digits", "train": 0}, "train is 0; it must be at least 1"),
        ({"source": "digits", "test": -3}, "test is -3"),
        ({"source": "digits", "length": 1}, "length is 1; it must be from 2 to 8192"),
        ({"source": "digits", "seed": -1}, "seed is -1"),
    ],
)
def test_nonsense_in_the_table_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataTable, raw, "job.toml: data")


# Splits and draws


def test_digits_are_those_of_the_demo() -> None:
    data = load_dataset(DataTable("digits"))
    for part, demo in zip((data.train, data.held_out), digits.load(), strict=True):
        np.testing.assert_array_equal(part.x, demo.x)
        np.testing.assert_array_equal(part.y, demo.y)
        assert part.x.dtype == np.float32
        assert part.y.dtype == np.int64
    assert (data.classes, data.task, data.domains) == (10, "classes", None)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    size=st.integers(1, 200),
    seed=st.integers(0, 50),
)
def test_a_draw_is_stratified(counts: list[int], size: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    drawn = stratified(labels, size, np.random.default_rng(seed))
    assert len(drawn) == min(size, len(labels))
    assert (np.diff(drawn) > 0).all()
    taken = np.bincount(labels[drawn], minlength=len(counts))
    quotas = np.array(counts) * len(drawn) / len(labels)
    assert (np.abs(taken - quotas) < 1).all()


def test_fewer_rows_are_drawn_with_classes_in_proportion(tmp_path: Path) -> None:
    y = np.repeat([0, 1, 2], [60, 30, 10])
    x = np.arange(100, dtype=np.float32)[:, None]
    table = save(tmp_path / "a.npz", x=x, y=y)
    data = load_dataset(DataTable(table.source, 0.5, train=20, test=10))
    assert np.bincount(data.train.y).tolist() == [12, 6, 2]
    assert np.bincount(data.held_out.y).tolist() == [6, 3, 1]
    whole = load_dataset(DataTable(table.source, 0.5, train=1000, test=10))
    assert (len(whole.train), len(whole.held_out)) == (50, 10)
    np.testing.assert_array_equal(whole.held_out.x, data.held_out.x)
    assert set(data.train.x[:, 0]) < set(whole.train.x[:, 0])


@pytest.mark.parametrize("held_out", [0.001, 0.2, 0.999])
def test_no_row_is_on_both_sides_and_none_is_lost(tmp_path: Path, held_out: float) -> None:
    x, y = np.arange(97, dtype=np.float32)[:, None], np.arange(97) % 4
    table = save(tmp_path / "a.npz", x=x, y=y)
    one, same, other = (
        load_dataset(DataTable(table.source, held_out, seed=seed)) for seed in (0, 0, 1)
    )
    rows = np.concatenate([one.train.x, one.held_out.x])[:, 0]
    assert sorted(rows.tolist()) == list(range(97))
    assert len(one.held_out) == min(max(round(97 * held_out), 1), 96)
    for part in (one.train, one.held_out):
        np.testing.assert_array_equal(part.y, part.x[:, 0] % 4)
    np.testing.assert_array_equal(one.held_out.x, same.held_out.x)
    assert not np.array_equal(one.held_out.x, other.held_out.x)


# .npz


@pytest.mark.parametrize(
    ("shape", "becomes"),
    [
        ((5, 7), (1, 5, 7)),
        ((5, 7, 3), (3, 5, 7)),
        ((5, 7, 1), (1, 5, 7)),
        ((3, 5, 7), (3, 5, 7)),
        ((1, 5, 3), (1, 5, 3)),
    ],
)
def test_images_become_channels_first_and_standardised(
    tmp_path: Path, shape: tuple[int, ...], becomes: tuple[int, ...]
) -> None:
    train, test = pixels(30, *shape), pixels(10, *shape)
    labels = np.arange(40, dtype=np.uint8) % 5
    table = save(
        tmp_path / "a.npz", x_train=train, y_train=labels[:30], x_test=test, y_test=labels[30:]
    )
    data = load_dataset(table)
    assert data.train.x.shape == (30, *becomes)
    assert data.train.x.dtype == np.float32
    first = [x if x.ndim == 4 else x[:, None] for x in (train, test)]
    if len(shape) == 3 and shape != becomes:
        first = [x.transpose(0, 3, 1, 2) for x in first]
    for part, x in zip((data.train, data.held_out), first, strict=True):
        np.testing.assert_allclose(part.x, standardised(x, first[0]), atol=1e-5)
    np.testing.assert_array_equal(data.train.y, labels[:30])
    assert data.train.y.dtype == np.int64
    assert data.classes == 5


def test_a_channel_without_contrast_is_not_divided_by_zero(tmp_path: Path) -> None:
    x = np.full((10, 3, 4, 4), 255, np.uint8)
    data = load_dataset(save(tmp_path / "a.npz", x=x, y=np.arange(10) % 2))
    assert not data.train.x.any()


def test_standardisation_takes_the_rows_that_are_trained_on(tmp_path: Path) -> None:
    x = pixels(100, 6, 6)
    table = save(tmp_path / "a.npz", x=x, y=np.arange(100) % 2)
    data = load_dataset(DataTable(table.source, train=10))
    assert len(data.train) == 10
    assert abs(data.train.x.mean()) < 1e-5
    assert abs(data.train.x.std() - 1) < 1e-5


def test_floats_keep_their_values(tmp_path: Path) -> None:
    x = rng.normal(size=(20, 9))
    y = np.arange(20) % 2
    table = save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    data = load_dataset(table)
    np.testing.assert_array_equal(data.train.x, x.astype(np.float32))


def test_a_class_of_test_rows_counts(tmp_path: Path) -> None:
    x = np.zeros((4, 2), np.float32)
    y = np.arange(4)
    table = save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y + 3)
    assert load_dataset(table).classes == 7


@pytest.mark.parametrize("split", [False, True])
def test_domains_stay_with_their_rows(tmp_path: Path, split: bool) -> None:
    x, y = np.arange(90, dtype=np.float32)[:, None], np.arange(90) % 2
    domain = (np.arange(90) // 30).astype(np.int8)
    arrays = {"x": x, "y": y, "domain": domain}
    if split:
        arrays = {"x_train": x, "y_train": y, "domain_train": domain, "x_test": x, "y_test": y}
    table = save(tmp_path / "a.npz", **arrays)
    data = load_dataset(DataTable(table.source, train=30))
    assert data.domains is not None
    assert data.domains.dtype == np.int64
    np.testing.assert_array_equal(data.domains, data.train.x[:, 0] // 30)
    assert np.bincount(data.domains).tolist() == [10, 10, 10], "strata are classes of domains"


X, Y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "no array y; it needs x and y"),
        ({"x_train": X, "y_train": Y}, "no array x_test, y_test"),
        ({"x": X, "y": Y / 2}, "labels are float64; they must be integers"),
        ({"x": X, "y": np.array(list("abab"))}, "labels are <U1; they must be integers"),
        ({"x": X, "y": Y - 1}, "the smallest label is -1, labels start at 0"),
        ({"x": X, "y": Y[:3]}, r"y has shape \[3\]; it must be \[4\], a label per row"),
        ({"x": X, "y": Y[:, None]}, r"y has shape \[4, 1\]"),
        ({"x": X[:, 0], "y": Y}, r"x has shape \[4\]; it must be \(rows, ...\)"),
        ({"x": X[:0], "y": Y[:0]}, r"x has shape \[0, 2\]"),
        ({"x": X.astype(np.int64), "y": Y}, "x is int64 of shape .* must be floats, or images"),
        ({"x": X.astype(np.uint8), "y": Y}, "x is uint8 of shape"),
        ({"x": X + np.nan, "y": Y}, "not finite"),
        ({"x": X, "y": Y, "domain": Y[:3]}, r"domains have shape \[3\] .* each of 4 rows"),
        ({"x": X, "y": Y, "domain": Y / 2}, "domains have shape .* dtype float64"),
        ({"x": X[:1], "y": Y[:1]}, "1 is too few"),
        (
            {"x": np.array([{}, {}, {}, {}]), "y": Y},
            "as .npz: x holds Python objects",
        ),
        (
            {"x_train": X, "y_train": Y, "x_test": X[:, :1], "y_test": Y},
            r"a test row is float32 \[1\], a training row is float32 \[2\]",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 damaged"])
def test_a_damaged_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_dataset(DataTable("a.npz"), tmp_path)


def test_an_encrypted_npz_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", x=X, y=Y)
    content = (tmp_path / "a.npz").read_bytes()
    headers = ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8))  # where the flags are
    for signature, offset in headers:
        start = content.index(signature) + offset
        content = content[:start] + bytes([content[start] | 1]) + content[start + 1 :]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz: .*encrypted"):
        load_dataset(DataTable("a.npz"), tmp_path)


# CIFAR-10

CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar(folder: Path, kind: str, protocol: int = 4) -> tuple[Array, Array]:
    """Write two images per file, 12 in all; return them and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pixels(12, 3, 32, 32), np.arange(12) % 10
    for i, name in enumerate(CIFAR):
        rows, labels = x[2 * i : 2 * i + 2].reshape(2, -1), y[2 * i : 2 * i + 2]
        if kind == "binary":
            records = np.concatenate([labels[:, None].astype(np.uint8), rows], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {b"data": rows, b"labels": labels.tolist(), b"batch_label": b"batch"}
            (folder / name).write_bytes(pickle.dumps(content, protocol))
    return x, y


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("python", ""),
        ("python", "cifar-10-batches-py"),
        ("binary", ""),
        ("binary", "cifar-10-batches-bin"),
    ],
)
def test_cifar_is_read(tmp_path: Path, kind: str, inner: str) -> None:
    x, y = write_cifar(tmp_path / inner, kind)
    data = load_dataset(DataTable(tmp_path.name), tmp_path.parent)
    np.testing.assert_array_equal(data.train.y, y[:10])
    np.testing.assert_array_equal(data.held_out.y, y[10:])
    np.testing.assert_allclose(data.train.x, standardised(x[:10], x[:10]), atol=1e-5)
    np.testing.assert_allclose(data.held_out.x, standardised(x[10:], x[:10]), atol=1e-5)
    assert data.classes == 10


def python2_pickle(rows: Array, labels: list[int]) -> bytes:
    """Return a pickle like the original files: protocol 2, Python 2 strings, numpy's old module."""

    def string(value: bytes) -> bytes:
        return pickle.BINSTRING + len(value).to_bytes(4, "little") + value

    def integer(value: int) -> bytes:
        return pickle.BININT + value.to_bytes(4, "little", signed=True)

    dtype = (
        b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
        b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    )
    shape = b"(" + b"".join(map(integer, rows.shape)) + b"t"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
        + string(b"b") + b"tR(" + integer(1) + shape + dtype + b"I00\n" + string(rows.tobytes())
        + b"tb"
    )  # fmt: skip
    items = string(b"data") + array + string(b"labels")
    items += b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_cifar_of_any_python_is_read(tmp_path: Path, protocol: int) -> None:
    x, y = write_cifar(tmp_path, "python", protocol)
    rows = np.asfortranarray(x[2:4].reshape(2, -1))  # Fortran order in memory
    content = {"data": rows, "labels": y[2:4].tolist()}
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(content, protocol))
    (tmp_path / "test_batch").write_bytes(python2_pickle(x[10:].reshape(2, -1), [3, 4]))
    data = load_dataset(DataTable(str(tmp_path)))
    np.testing.assert_allclose(data.train.x, standardised(x[:10], x[:10]), atol=1e-5)
    np.testing.assert_allclose(data.held_out.x, standardised(x[10:], x[:10]), atol=1e-5)
    assert data.held_out.y.tolist() == [3, 4]


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def test_a_malicious_pickle_is_refused_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, "python")
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Malicious()}))
    with pytest.raises(DataError, match=r"test_batch is refused: it holds posix.mkdir"):
        load_dataset(DataTable("."))
    assert not (tmp_path / "hacked").exists()


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no pickle of CIFAR-10"),
        (b"\x80\x04garbage", "is no pickle of CIFAR-10|is refused"),
        (pickle.dumps([1, 2]), "has no data"),
        (pickle.dumps({b"labels": [1, 2]}), "has no data"),
        (pickle.dumps({b"data": ROWS[:, :9], b"labels": [1, 2]}), "has no data"),
        (pickle.dumps({b"data": ROWS.astype("<i4"), b"labels": [1, 2]}), "has no data"),
        (pickle.dumps({b"data": ROWS.astype("f4"), b"labels": [1, 2]}), "array of 'f4'"),
        (pickle.dumps({b"data": ROWS.astype(object), b"labels": [1]}), "an array of 'O8'"),
        (pickle.dumps({b"data": ROWS, b"labels": [1.0, 2]}), "no list of integer labels"),
        (pickle.dumps({b"data": ROWS}), "no list of integer labels"),
        (pickle.dumps({b"data": ROWS, b"labels": [1]}), "has 2 images, but 1 labels"),
        (pickle.dumps({b"data": ROWS, b"labels": [1, 10]}), "its labels are not 0 to 9"),
        (pickle.dumps({b"data": ROWS[:0], b"labels": []}), "its labels are not 0 to 9"),
        (b"cnumpy\nndarray\n)R.", "has no data"),
        (
            b"cnumpy._core.numeric\n_frombuffer\n(J\xff\xff\xff\x7fcnumpy\ndtype\n"
            b"(\x8c\x02u1tRK\x01\x8c\x01CtR.",  # a number instead of bytes: nothing is allocated
            "a bytes-like object is required",
        ),
        (b"}(\x8c\x04datacnumpy\nndarray\n)Ru.", "has no data"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_cifar(tmp_path, "python")
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_3.*({message})"):
        load_dataset(DataTable(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, CIFAR-10 has 3073 for each image"),
        (bytes(3074), "has 3074 bytes"),
        (b"\x0a" + bytes(3072), "its labels are not 0 to 9"),
    ],
)
def test_a_binary_batch_that_is_none_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    write_cifar(tmp_path, "binary")
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset(DataTable(str(tmp_path)))


def test_half_of_cifar_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "python")
    (tmp_path / "data_batch_2").unlink()
    (tmp_path / "test_batch").unlink()
    with pytest.raises(DataError, match="CIFAR-10 without data_batch_2, test_batch"):
        load_dataset(DataTable(str(tmp_path)))


# Folders of images


def test_classes_of_images_are_read(tmp_path: Path) -> None:
    cats = save_pictures(tmp_path / "cat", pixels(6, 4, 5, 3))
    dogs = save_pictures(tmp_path / "dog", pixels(4, 4, 5, 3), "{}.PNG")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_dataset(DataTable(str(tmp_path), 0.5))
    assert (len(data.train), len(data.held_out), data.classes) == (5, 5, 2)
    assert np.bincount(data.train.y).tolist() == [3, 2]
    assert data.domains is None
    x = np.concatenate([cats, dogs]).transpose(0, 3, 1, 2)
    # Each image is found by its values, standardised with the training rows.
    chosen = [i for i in range(10) for row in data.train.x if correlated(row, x[i])]
    assert len(chosen) == 5
    np.testing.assert_allclose(data.train.x, standardised(x[chosen], x[chosen]), atol=1e-5)
    assert data.train.y.tolist() == [int(i >= 6) for i in chosen]


def correlated(one: Array, other: Array) -> bool:
    """Return whether the first channels are equal up to mean and scale."""
    return bool(np.corrcoef(one[0].ravel(), other[0].ravel())[0, 1] > 0.9999)


def test_a_test_folder_is_kept(tmp_path: Path) -> None:
    train = np.concatenate([save_pictures(tmp_path / "train" / n, pixels(3, 4, 4)) for n in "ab"])
    test = save_pictures(tmp_path / "test" / "b", pixels(2, 4, 4))
    data = load_dataset(DataTable(str(tmp_path)))
    assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.held_out.y.tolist() == [1, 1]
    assert data.train.x.shape == (6, 1, 4, 4), "grey images have one channel"
    train, test = train[:, None], test[:, None]
    np.testing.assert_allclose(data.train.x, standardised(train, train), atol=1e-5)
    np.testing.assert_allclose(data.held_out.x, standardised(test, train), atol=1e-5)


def test_domains_of_images_are_read(tmp_path: Path) -> None:
    for domain, classes in (("photo", "ab"), ("sketch", "bc")):
        for name in classes:
            grey = domain == "sketch"
            shape = (5, 4, 4) if grey else (5, 4, 4, 3)
            save_pictures(tmp_path / domain / name, pixels(*shape), "{}.jpg")
    data = load_dataset(DataTable(str(tmp_path), 0.4))
    assert data.train.x.shape == (12, 3, 4, 4), "grey images become colour next to colour"
    assert data.domains is not None
    assert list(zip(data.domains.tolist(), data.train.y.tolist(), strict=True)) == [
        pair for pair in ((0, 0), (0, 1), (1, 1), (1, 2)) for _ in range(3)
    ]
    assert data.classes == 3
    sketches = data.train.x[data.domains == 1]
    assert sketches.shape[0] == 6


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_dataset(DataTable(str(tmp_path)))

    refused("has no class folders")
    (tmp_path / "a").mkdir()
    refused(r"class folder .*a has no images \(.png, .jpg\)")
    save_pictures(tmp_path / "a", pixels(2, 4, 5))
    save_pictures(tmp_path / "b", pixels(2, 5, 4))
    refused(r"b/0.png has 4 x 5 pixels, .*a/0.png has 5 x 4; all images must have the same size")
    (tmp_path / "b" / "0.png").write_bytes(b"no image")
    refused("b/0.png cannot be read as an image")
    whole = (tmp_path / "a" / "1.png").read_bytes()
    save_pictures(tmp_path / "b", pixels(2, 4, 5))
    (tmp_path / "b" / "1.png").write_bytes(whole[: len(whole) // 2])
    refused("b/1.png cannot be read as an image")
    save_pictures(tmp_path / "b", np.zeros((2, 4, 5), np.uint16))
    refused("b/0.png has more than 8 bits per channel")
    save_pictures(tmp_path / "b", pixels(2, 4, 5))
    load_dataset(DataTable(str(tmp_path)))
    (tmp_path / "a" / "x").mkdir()
    refused(r"a/0.png lies beside class folders; move it into one")
    for i in range(2):
        (tmp_path / "a" / f"{i}.png").unlink()
    refused("x has no images")
    save_pictures(tmp_path / "a" / "x", pixels(2, 4, 5))
    refused("b has no class folders")


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read: Permission denied"):
        load_dataset(DataTable(str(tmp_path)))


def test_train_without_test_is_refused(tmp_path: Path) -> None:
    save_pictures(tmp_path / "train" / "a", pixels(2, 4, 4))
    with pytest.raises(DataError, match="has only one of train and test"):
        load_dataset(DataTable(str(tmp_path)))
    save_pictures(tmp_path / "test" / "b", pixels(2, 4, 4))
    with pytest.raises(DataError, match="test has the class 'b', train does not have it"):
        load_dataset(DataTable(str(tmp_path)))


# Text


@settings(max_examples=100, deadline=None)
@given(
    paragraphs=st.lists(st.binary(min_size=1, max_size=50), max_size=8),
    length=st.integers(2, 20),
)
def test_texts_hold_every_byte_that_another_follows(paragraphs: list[bytes], length: int) -> None:
    texts = cut_text(paragraphs, length)
    assert texts.x.shape == texts.y.shape
    assert texts.x.shape[1] == length
    counted = texts.y >= 0
    pairs = [pair for text in paragraphs for pair in pairwise(text)]
    assert list(zip(texts.x[counted], texts.y[counted], strict=True)) == pairs
    assert counted.any(1).all(), "each text has something to learn"
    # Labels that count come first; at most one token, the last, comes after them.
    ends = counted.sum(1)
    for x, y, end in zip(texts.x, texts.y, ends, strict=True):
        assert (y[:end] >= 0).all()
        assert not x[end + 1 :].any()
        np.testing.assert_array_equal(x[1:end], y[: end - 1])


def test_a_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    text = "Über uns\nhier\n\nab\r\n \t\r\n\n cd \n\nx\n\n" + "0123456789" * 2
    (tmp_path / "a.txt").write_text(text, newline="")
    seen: dict[bytes, Array] = {}
    for seed in range(8):
        data = load_dataset(DataTable("a.txt", 0.3, length=8, seed=seed), tmp_path)
        assert (data.classes, data.task, data.domains) == (256, "tokens", None)
        for part in (data.train, data.held_out):
            assert part.x.dtype == part.y.dtype == np.int64
            assert part.x.shape == part.y.shape == (len(part), 8)
            for x, y in zip(part.x, part.y, strict=True):
                seen[bytes(x.astype(np.uint8)).rstrip(b"\0")] = y
        both = {bytes(x.astype(np.uint8)) for x in data.train.x}
        assert not both & {bytes(x.astype(np.uint8)) for x in data.held_out.x}
    whole = "Über uns\nhier".encode()
    assert seen.keys() == {whole[:8], whole[8:], b"ab", b"cd", b"01234567", b"89012345", b"6789"}
    assert seen[b"ab"].tolist() == [ord("b"), -1, -1, -1, -1, -1, -1, -1]
    assert seen[b"01234567"].tolist() == list(b"12345678")
    assert seen[b"6789"].tolist() == [*b"789", -1, -1, -1, -1, -1]


def test_texts_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n\n".join(f"paragraph {i}" for i in range(50)))
    data = load_dataset(DataTable("a.md", train=12, test=3), tmp_path)
    assert (len(data.train), len(data.held_out)) == (12, 3)


@pytest.mark.parametrize("name", ["notes", "notes.rst"])
def test_what_is_utf8_is_a_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("größer\n\nals\n\nnichts", "utf-8")
    assert load_dataset(DataTable(name), tmp_path).task == "tokens"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one paragraph", r"a.txt \(paragraphs\): 1 is too few"),
        ("a.txt", b"", r"a.txt \(paragraphs\): 0 is too few"),
        ("a.txt", b"a\n\nb\n\nc", "too few paragraphs of more than one byte"),
        ("a.txt", b"ab\0c\n\nd", "holds bytes of value 0"),
        ("a.bin", b"\xff\xfe\xfd", "the format of .*a.bin is not known; known are digits; .npz"),
        ("a.npy", b"\x93NUMPY", "is not known; known are .* a folder of CIFAR-10"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_dataset(DataTable(name), tmp_path)


def test_a_text_in_another_encoding_is_bytes_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer\n\nkleiner".encode("latin-1"))
    assert load_dataset(DataTable("a.txt"), tmp_path).task == "tokens"


@pytest.mark.parametrize("name", ["missing", "missing.npz", "missing.txt"])
def test_what_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"no data at .*{name}; known are digits; .npz"):
        load_dataset(DataTable(name), tmp_path)
