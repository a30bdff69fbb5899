"""Data for a fleet: reads a source, splits off held-out rows, draws rows, and scales pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edge_sdk.bundle.ranges import MAX_POSITIONS
from edge_sdk.errors import DataError
from edge_sdk.files import why
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
"""The formats that :func:`load_dataset` reads, for error messages."""
TEXTS = {".txt", ".text", ".md"}
BYTES = 256


@dataclass(frozen=True)
class Dataset:
    """Examples that a fleet trains on, and examples that it is measured on.

    Attributes:
        train: training examples, which the clients share.
        held_out: examples that accuracy or perplexity is measured on; none of them is in
            ``train``.
        classes: number of classes; for ``tokens`` the size of the vocabulary.
        task: ``classes`` (one label per row) or ``tokens`` (one label per position).
        domains: domain of each row of ``train``, (rows,) int64; None if the data have no domains.
    """

    train: Examples
    held_out: Examples
    classes: int
    task: str = "classes"
    domains: Array | None = None


@dataclass(frozen=True)
class DataTable:
    """The data of a job: the table ``[data]``.

    Attributes:
        source: ``digits`` for scikit-learn's bundled digits, or a path.
        held_out: fraction of the rows (of the paragraphs, for text) to hold out. A source with a
            test split of its own, such as digits or CIFAR-10, keeps its split.
        train: maximum number of training rows, drawn with every class in proportion; None for
            all.
        test: maximum number of held-out rows, drawn in the same way; None for all.
        length: maximum number of tokens of a text; a longer paragraph becomes several texts.
        tokenizer: folder of a tokenizer of transformers, for texts; None for bytes as tokens.
        scale: how pixels are scaled: ``standard`` to mean 0 and deviation 1 per channel, ``unit``
            to the range from 0 to 1, which adversarial examples need.
        seed: seed of the split and of the draw of rows.
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
            raise ValueError("source is empty; it must be 'digits' or a path")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be between 0 and 1")
        for name, size in (("train", self.train), ("test", self.test)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if not 2 <= self.length <= MAX_POSITIONS:
            raise ValueError(f"length is {self.length}; it must be from 2 to {MAX_POSITIONS}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


def load_dataset(table: DataTable, base: Path = Path()) -> Dataset:
    """Read the data of a job.

    Images (n, h, w) and (n, h, w, c) become (n, 1, h, w) and (n, c, h, w) float32. Pixels in
    uint8 are scaled to [0, 1] and, with the scale ``standard``, standardised per channel with mean
    and deviation of the training rows; floats keep their values. The tokens of a text are its
    bytes, or the tokens that a tokenizer gives for its paragraphs: x (n, length) int64, padded
    with 0; y of the same shape, the next token, -1 where there is none.

    Args:
        table: the table ``[data]`` of the job.
        base: folder that a relative path starts from.

    Raises:
        DataError: the source does not exist, has an unknown format, or is invalid in its format.
    """
    # Each choice has its own generator, so the split and the test rows do not depend on the
    # number of training rows.
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
        raise DataError(f"{path} cannot be read: {why(error)}") from error
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
    """Return integers (parts,) that sum to ``total``, as close to proportional as possible.

    Each part gets the integer part of its quota; the rest goes to the largest fractions.

    Args:
        shares: proportions (parts,), not negative, not all zero.
        total: the sum to share out.
    """
    quotas = total * shares / shares.sum()
    counts: Array = np.floor(quotas).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:rest]] += 1
    return counts


def stratified(strata: Array, size: int | None, rng: np.random.Generator) -> Array:
    """Draw at most ``size`` row numbers, sorted, with every stratum in proportion.

    Args:
        strata: stratum of each row, (rows,) integers.
        size: number of rows to draw; None for all.
        rng: generator for the draw.
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
    """Return how many of ``rows`` to hold out: at least one, and at least one row remains."""
    if rows < 2:
        raise DataError(f"{name}: {rows} is too few to hold any out; at least 2 are needed")
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
        raise DataError(f"{path} cannot be read: {why(error)}") from error
    except UnicodeDecodeError:
        return path.suffix in TEXTS
    return True


def _load_text(
    path: Path, table: DataTable, base: Path, generators: Sequence[np.random.Generator]
) -> Dataset:
    """Read a text; whole paragraphs are held out, so no paragraph is on both sides of the split."""
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
    """Check a source; return its rows unchanged, its labels and domains as int64."""
    train = _checked_part(source.train, name)
    test = None if source.test is None else _checked_part(source.test, name)
    if test is not None and (
        test.x.shape[1:] != train.x.shape[1:] or test.x.dtype != train.x.dtype
    ):
        raise DataError(
            f"{name}: a test row is {test.x.dtype} {list(test.x.shape[1:])}, a training row is "
            f"{train.x.dtype} {list(train.x.shape[1:])}; dtype and shape must be the same"
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
        raise DataError(f"{name}: x has shape {list(data.x.shape)}; it must be (rows, ...)")
    if data.y.shape != data.x.shape[:1]:
        raise DataError(
            f"{name}: y has shape {list(data.y.shape)}; it must be [{len(data.x)}], a label per row"
        )
    if data.y.dtype.kind not in "iu":
        raise DataError(f"{name}: labels are {data.y.dtype}; they must be integers from 0 on")
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
    """Return both as float32 with channels first.

    Pixels in uint8 are standardised, or scaled to the range from 0 to 1 if ``unit`` is true.
    """
    train, test = _channels_first(train), _channels_first(test)
    if train.dtype != np.uint8:
        return train.astype(np.float32), test.astype(np.float32)
    scaled = np.empty(train.shape, np.float32), np.empty(test.shape, np.float32)
    levels = np.arange(256) / 255
    for channel in range(train.shape[1]):
        # Pixels have only 256 values; counting them is exact and needs no copy in float64.
        counts = np.bincount(train[:, channel].ravel(), minlength=256)
        mean = 0.0 if unit else np.average(levels, weights=counts)
        deviation = 1.0 if unit else np.sqrt(np.average((levels - mean) ** 2, weights=counts))
        # The deviation of a constant channel is 0; such a channel is not scaled.
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
