"""Data for a fleet: read in the formats they come in, split, drawn and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples
from server_hub.simulation.formats import (
    Source,
    cut_text,
    find_cifar,
    read_cifar,
    read_npz,
    read_pictures,
    read_text,
    read_tokenizer,
)

FORMATS = (
    "digits; .npz with x and y, or with x_train, y_train, x_test and y_test; a folder of CIFAR-10 "
    "(python or binary version); a folder of images CLASS/*.png (.jpg), train/CLASS/*.png with "
    "test/CLASS/*.png, or DOMAIN/CLASS/*.png; UTF-8 text"
)
"""The formats that :func:`load_dataset` knows, as errors list them."""
TEXTS = {".txt", ".text", ".md"}
BYTES = 256


@dataclass(frozen=True)
class Dataset:
    """Examples to train a fleet on, and examples to measure it on.

    Attributes:
        train: what the clients share.
        held_out: what accuracy is measured on; no row of it is in ``train``.
        classes: number of classes; for ``tokens`` the size of the vocabulary.
        task: ``classes`` (one label per row) or ``tokens`` (one label per position).
        domains: domain of each row of ``train`` (rows,), int64; None if the data have none.
    """

    train: Examples
    held_out: Examples
    classes: int
    task: str = "classes"
    domains: Array | None = None


@dataclass(frozen=True)
class DataTable:
    """What ``[data]`` of a job may say.

    Attributes:
        source: ``digits`` for scikit-learn's bundled digits, else a path.
        held_out: fraction of the rows (of the paragraphs, for text) to hold out; a source with a
            test split of its own, as digits and CIFAR-10 have, keeps that.
        train: training rows at most, drawn with every class in proportion; None for all.
        test: held-out rows at most, drawn in the same way.
        length: tokens of one text; a longer paragraph becomes several texts.
        tokenizer: folder of a tokenizer of transformers, for texts; None for bytes as tokens.
        scale: what pixels become: ``standard``, with mean 0 and deviation 1 per channel, or
            ``unit``, from 0 to 1, as adversarial examples need them.
        seed: of the split and of the rows that are drawn.
    """

    source: str
    held_out: float = 0.2
    train: int | None = None
    test: int | None = None
    length: int = 64
    tokenizer: str | None = None
    scale: Literal["standard", "unit"] = "standard"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty, must be 'digits' or a path")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, must be between 0 and 1")
        for name, size in (("train", self.train), ("test", self.test)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}, must be at least 1")
        if self.length < 2:
            raise ValueError(f"length is {self.length}, must be at least 2")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must not be negative")


def load_dataset(table: DataTable, base: Path = Path()) -> Dataset:
    """Read the data of a job.

    Images (n, h, w) and (n, h, w, c) become (n, 1, h, w) and (n, c, h, w) float32. Pixels in
    uint8 are scaled to [0, 1], then, if so asked, standardised per channel with mean and deviation
    of the training rows; floats keep their values. The tokens of a text are its bytes, or what a
    tokenizer makes of its paragraphs: x (n, length) int64, padded with 0; y is the token that
    follows, -1 where none does.

    Args:
        table: what to read.
        base: folder that a relative path starts from.

    Raises:
        DataError: nothing there, an unknown format, or contents that do not fit their format.
    """
    # A generator for each choice: another number of training rows keeps split and test rows.
    generators = of_split, of_train, of_test = np.random.default_rng(table.seed).spawn(3)
    path = base / table.source
    if table.source != "digits":
        if not path.exists():
            raise DataError(f"no data at {path}; known are {FORMATS}")
        if _is_text(path):
            return _load_text(path, table, base, generators)
    if table.tokenizer is not None:
        raise DataError(f"{table.source} is no text; leave out tokenizer, which is for texts")
    try:
        source = _checked(_read(table.source, path), table.source)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    train, test, domains = source.train, source.test, source.domains
    strata = train.y if domains is None else domains * (1 + train.y.max()) + train.y
    rows = np.arange(len(train))
    if test is None:
        size = _held_out(len(train), f"{table.source} (rows)", table.held_out)
        held = stratified(strata, size, of_split)
        rows = np.delete(rows, held)
        test = _take(train, held)
    classes = 1 + int(max(train.y.max(), test.y.max()))
    rows = rows[stratified(strata[rows], table.train, of_train)]
    train, test = _take(train, rows), _take(test, stratified(test.y, table.test, of_test))
    train_x, test_x = _scaled(train.x, test.x, table.scale == "unit")
    return Dataset(
        Examples(train_x, train.y),
        Examples(test_x, test.y),
        classes,
        domains=None if domains is None else domains[rows],
    )


def apportion(shares: Array, total: int) -> Array:
    """Integers that sum to ``total``, as near to proportional to ``shares`` as can be.

    Everyone gets the whole part of its quota; what remains goes to the largest fractions.

    Args:
        shares: (parts,), not negative, not all zero.
        total: what to share out.
    """
    quotas = total * shares / shares.sum()
    counts: Array = np.floor(quotas).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:rest]] += 1
    return counts


def stratified(strata: Array, size: int | None, rng: np.random.Generator) -> Array:
    """Random rows, sorted, ``size`` of them at most, with every stratum in proportion.

    Args:
        strata: integer per row (rows,).
        size: rows to draw; None for all.
        rng: draws them.
    """
    if size is None or size >= len(strata):
        return np.arange(len(strata))
    names, counts = np.unique(strata, return_counts=True)
    parts = [
        rng.permutation(np.flatnonzero(strata == name))[:take]
        for name, take in zip(names, apportion(counts, size), strict=True)
    ]
    return np.sort(np.concatenate(parts))


def _take(data: Examples, rows: Array) -> Examples:
    return Examples(data.x[rows], data.y[rows])


def _held_out(rows: int, name: str, fraction: float) -> int:
    """How many to hold out; at least one, and at least one remains."""
    if rows < 2:
        raise DataError(f"{name}: {rows} of them are too few to hold any out")
    return min(max(round(rows * fraction), 1), rows - 1)


def _read(name: str, path: Path) -> Source:
    if name == "digits":
        from server_hub.simulation import digits

        return Source(*digits.load())
    if path.is_dir():
        cifar = find_cifar(path)
        return read_pictures(path) if cifar is None else read_cifar(*cifar)
    if path.suffix == ".npz":
        return read_npz(path)
    raise DataError(f"the format of {path} is not known; known are {FORMATS}")


def _is_text(path: Path) -> bool:
    if path.is_dir() or path.suffix == ".npz":
        return False
    try:
        path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        return path.suffix in TEXTS
    return True


def _load_text(
    path: Path, table: DataTable, base: Path, generators: Sequence[np.random.Generator]
) -> Dataset:
    """Whole paragraphs are held out, so that no text of one is on both sides."""
    of_split, of_train, of_test = generators
    written = read_text(path)
    paragraphs: Sequence[Sequence[int]] = written
    vocabulary, unit = BYTES, "byte"
    if table.tokenizer is not None and written:
        tokenizer = read_tokenizer(base / table.tokenizer)
        said = [part.decode("utf-8", "replace") for part in written]
        paragraphs = tokenizer(said, add_special_tokens=False)["input_ids"]
        vocabulary, unit = len(tokenizer), "token"
    order = of_split.permutation(len(paragraphs))
    cut = _held_out(len(paragraphs), f"{path} (paragraphs)", table.held_out)

    def texts(rows: Array, size: int | None, rng: np.random.Generator) -> Examples:
        cut = cut_text([paragraphs[row] for row in np.sort(rows)], table.length)
        if len(cut) == 0:
            raise DataError(
                f"{path} has too few paragraphs of more than one {unit} to hold any out"
            )
        drawn = stratified(np.zeros(len(cut), np.int64), size, rng)
        return Examples(cut.x[drawn], cut.y[drawn])

    train = texts(order[cut:], table.train, of_train)
    return Dataset(train, texts(order[:cut], table.test, of_test), vocabulary, "tokens")


def _checked(source: Source, name: str) -> Source:
    """The same rows, labels and domains as int64, if they are what they must be."""
    train = _checked_part(source.train, name)
    test = None if source.test is None else _checked_part(source.test, name)
    if test is not None and (
        test.x.shape[1:] != train.x.shape[1:] or test.x.dtype != train.x.dtype
    ):
        raise DataError(
            f"{name}: a test row is {test.x.dtype} {list(test.x.shape[1:])}, "
            f"a training row {train.x.dtype} {list(train.x.shape[1:])}; they must be alike"
        )
    domains = source.domains
    if domains is None:
        return Source(train, test)
    if domains.shape != train.y.shape or domains.dtype.kind not in "iu":
        raise DataError(
            f"{name}: domains have shape {list(domains.shape)} and dtype {domains.dtype}; "
            f"there must be an integer for each of {len(train)} rows"
        )
    return Source(train, test, domains.astype(np.int64))


def _checked_part(data: Examples, name: str) -> Examples:
    if data.x.ndim < 2 or len(data.x) == 0:
        raise DataError(f"{name}: x has shape {list(data.x.shape)}, must be (rows, ...)")
    if data.y.shape != data.x.shape[:1]:
        raise DataError(
            f"{name}: y has shape {list(data.y.shape)}, must be [{len(data.x)}], a label per row"
        )
    if data.y.dtype.kind not in "iu":
        raise DataError(f"{name}: labels are {data.y.dtype}, must be integers from 0 on")
    if data.y.min() < 0:
        raise DataError(f"{name}: the smallest label is {data.y.min()}, labels start at 0")
    if data.x.dtype.kind != "f" and (data.x.dtype != np.uint8 or data.x.ndim not in (3, 4)):
        raise DataError(
            f"{name}: x is {data.x.dtype} of shape {list(data.x.shape)}; "
            "must be floats, or images in uint8 (rows, height, width[, channels])"
        )
    if data.x.dtype.kind == "f" and not np.isfinite(data.x).all():
        raise DataError(f"{name}: x holds values that are not finite (NaN or infinity)")
    return Examples(data.x, data.y.astype(np.int64))


def _scaled(train: Array, test: Array, unit: bool) -> tuple[Array, Array]:
    """Both with channels first, as float32; pixels in uint8 standardised, or from 0 to 1."""
    train, test = _channels_first(train), _channels_first(test)
    if train.dtype != np.uint8:
        return train.astype(np.float32), test.astype(np.float32)
    scaled = np.empty(train.shape, np.float32), np.empty(test.shape, np.float32)
    levels = np.arange(256) / 255
    for channel in range(train.shape[1]):
        # There are 256 values only: counting them is exact and needs no copy in float64.
        counts = np.bincount(train[:, channel].ravel(), minlength=256)
        mean = 0.0 if unit else np.average(levels, weights=counts)
        deviation = 1.0 if unit else np.sqrt(np.average((levels - mean) ** 2, weights=counts))
        # A channel that is the same everywhere has nothing to scale.
        values = ((levels - mean) / (deviation or 1.0)).astype(np.float32)
        for target, pixels in zip(scaled, (train, test), strict=True):
            target[:, channel] = values[pixels[:, channel]]
    return scaled


def _channels_first(x: Array) -> Array:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x
