"""Readers of data formats: they return the contents of files, without any draw or scaling."""

from __future__ import annotations

import codecs
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.arrays import array_names, read_arrays
from edge_sdk.sources.images import PICTURES, image_header, read_image
from edge_sdk.training.data import Examples

CIFAR_SHAPE = (3, 32, 32)
CIFAR_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
CIFAR_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
"""Where the files of CIFAR-10 are: in the folder itself, or in the folder of the archive."""


@dataclass(frozen=True)
class Source:
    """The contents of a data source.

    Attributes:
        train: the training rows, or all rows if the source has no test split.
        test: the rows of the source's test split; None if it has none.
        domains: domain of each row of ``train``, (rows,); None if the source has no domains.
    """

    train: Examples
    test: Examples | None = None
    domains: Array | None = None


def read_npz(path: Path) -> Source:
    """Read ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test`` and ``y_test``.

    Raises:
        DataError: the file is not an ``.npz`` file, is damaged, or lacks an array.
    """
    names = array_names(path)
    split = "x_train" in names
    needed = ("x_train", "y_train", "x_test", "y_test") if split else ("x", "y")
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"{path} has no array {', '.join(missing)}; it needs x and y, "
            "or x_train, y_train, x_test and y_test"
        )
    domain = "domain_train" if split else "domain"
    arrays = read_arrays(path, [name for name in (*needed, domain) if name in names])
    parts = [Examples(arrays[needed[i]], arrays[needed[i + 1]]) for i in range(0, len(needed), 2)]
    return Source(parts[0], parts[1] if split else None, arrays.get(domain))


def find_cifar(folder: Path) -> tuple[list[Path], bool] | None:
    """Find CIFAR-10 in a folder; None if none of its files is there.

    Returns:
        The six files, and whether they are the binary version.

    Raises:
        DataError: only some of the six files exist.
    """
    for inner in CIFAR_FOLDERS:
        for suffix in ("", ".bin"):
            files = [folder / inner / (name + suffix) for name in CIFAR_BATCHES]
            missing = [file.name for file in files if not file.is_file()]
            if not missing:
                return files, suffix == ".bin"
            if len(missing) < len(files):
                raise DataError(
                    f"{folder / inner} is CIFAR-10 without {', '.join(missing)}; "
                    "unpack the archive again"
                )
    return None


def read_cifar(files: Sequence[Path], binary: bool) -> Source:
    """Read CIFAR-10: images (n, 3, 32, 32) uint8.

    Args:
        files: the six files; the last one holds the test images.
        binary: whether the files are the binary version; otherwise they are pickles.

    Raises:
        DataError: a file is damaged, or a pickle holds more than arrays and labels.
    """
    batches = [_cifar_binary(file) if binary else _cifar_pickle(file) for file in files]
    for file, batch in zip(files, batches, strict=True):
        if len(batch) == 0 or batch.y.min() < 0 or batch.y.max() > 9:
            raise DataError(f"{file} is no batch of CIFAR-10: its labels are not 0 to 9")
    x = np.concatenate([batch.x for batch in batches[:-1]])
    y = np.concatenate([batch.y for batch in batches[:-1]])
    return Source(Examples(x, y), batches[-1])


def _cifar_binary(file: Path) -> Examples:
    """Read records of one byte for the label, then the pixels, one channel after the other."""
    raw = np.fromfile(file, np.uint8)
    size = 1 + int(np.prod(CIFAR_SHAPE))
    if len(raw) == 0 or len(raw) % size:
        raise DataError(f"{file} has {len(raw)} bytes, CIFAR-10 has {size} for each image")
    records = raw.reshape(-1, size)
    return Examples(records[:, 1:].reshape(-1, *CIFAR_SHAPE), records[:, 0].astype(np.int64))


class _PickledDtype:
    """Replaces ``numpy.dtype`` while unpickling; accepts integer dtypes only."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name
        if not re.fullmatch("[iu][1248]", self.name):
            raise pickle.UnpicklingError(f"an array of {self.name!r} instead of integers")
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = {"<": "<", ">": ">"}.get(order, "=")

    def array(self, raw: Any, shape: Any, fortran: bool) -> Array:
        """Return the array; raise ValueError if the size of ``raw`` does not fit ``shape``."""
        numbers: Array = np.frombuffer(raw, self.order + self.name)
        return numbers.reshape(shape, order="F" if fortran else "C")


class _PickledArray:
    """Replaces ``numpy.ndarray`` while unpickling; rebuilds an array of integers from its bytes."""

    value: Array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _PickledDtype):
            raise pickle.UnpicklingError("an array without a dtype")
        self.value = dtype.array(raw, shape, fortran)


def _reconstruct(*_: object) -> _PickledArray:
    return _PickledArray()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


class _Unpickler(pickle.Unpickler):
    """Rebuilds containers, numbers and arrays; refuses everything else that a pickle names.

    It does not call numpy's own functions either: a forged state of a dtype makes them crash.
    """

    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}, which is neither an array nor a label")
        return self.KNOWN[module, name]


def _cifar_pickle(file: Path) -> Examples:
    """Read a pickled dictionary of ``data`` (n, 3072) uint8 and ``labels``; keys: bytes or str."""
    try:
        with open(file, "rb") as stream:
            # Python 2 wrote the original files, and its strings are bytes.
            content = _Unpickler(stream, encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{file} is refused: it holds {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{file} is no pickle of CIFAR-10: {error!r}") from error
    content = content if isinstance(content, dict) else {}
    data, labels = (content.get(key.encode(), content.get(key)) for key in ("data", "labels"))
    x = getattr(data, "value", None) if isinstance(data, _PickledArray) else None
    if x is None or x.dtype != np.uint8 or x.shape[1:] != (3072,):
        raise DataError(f"{file} is no batch of CIFAR-10: it has no data (n, 3072) of uint8")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise DataError(f"{file} is no batch of CIFAR-10: it has no list of integer labels")
    if len(labels) != len(x):
        raise DataError(f"{file} has {len(x)} images, but {len(labels)} labels")
    return Examples(x.reshape(-1, *CIFAR_SHAPE), np.array(labels))


def read_pictures(folder: Path) -> Source:
    """Read images from ``CLASS/*``, ``train/CLASS/*`` and ``test/CLASS/*``, or ``DOMAIN/CLASS/*``.

    Classes and domains are numbered in the order of their names.

    Raises:
        DataError: there are no images, a class is empty, sizes differ, or a file is not an image.
    """
    names = {inner.name for inner in _folders(folder)}
    if {"train", "test"} & names:
        if not {"train", "test"} <= names:
            raise DataError(f"{folder} has only one of train and test; it needs both, or neither")
        groups = [_classes(folder / "train"), _classes(folder / "test")]
        unknown = sorted(groups[1].keys() - groups[0].keys())
        if unknown:
            raise DataError(f"{folder}: test has the class {unknown[0]!r}, train does not have it")
        train, test = _decode(groups)
        return Source(train, test)
    domains = [inner for inner in _folders(folder) if _folders(inner)]
    if not domains:
        return Source(_decode([_classes(folder)])[0])
    groups = [_classes(domain) for domain in _folders(folder)]
    parts = _decode(groups)
    return Source(
        Examples(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts])),
        domains=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder, by the name of the class."""
    classes = {}
    stray = [p for p in folder.iterdir() if p.suffix.lower() in PICTURES]
    if stray and _folders(folder):
        raise DataError(f"{min(stray)} lies beside class folders; move it into one of them")
    for inner in _folders(folder):
        files = sorted(p for p in inner.iterdir() if p.suffix.lower() in PICTURES)
        if not files:
            raise DataError(f"the class folder {inner} has no images (.png, .jpg)")
        classes[inner.name] = files
    if not classes:
        raise DataError(f"{folder} has no class folders")
    return classes


def _decode(groups: Sequence[dict[str, list[Path]]]) -> list[Examples]:
    """Decode the images of each group: (n, h, w, 3) uint8, or (n, h, w) if all images are grey.

    All headers are read before any pixels, so that a wrong size is found before the long work.
    """
    numbers = {name: i for i, name in enumerate(sorted(set().union(*groups)))}
    first: tuple[Path, tuple[int, int]] | None = None
    grey = True
    for file in (file for group in groups for files in group.values() for file in files):
        size, is_grey = image_header(file)
        first = first or (file, size)
        if size != first[1]:
            raise DataError(
                f"{file} has {size[0]} x {size[1]} pixels, {first[0]} has "
                f"{first[1][0]} x {first[1][1]}; all images must have the same size"
            )
        grey = grey and is_grey
    parts = []
    for group in groups:
        images = [read_image(file, grey) for files in group.values() for file in files]
        labels = [numbers[name] for name, files in group.items() for _ in files]
        parts.append(Examples(np.stack(images), np.array(labels, np.int64)))
    return parts


def read_text(path: Path) -> list[bytes]:
    """Read the paragraphs of a text, which blank lines separate, without surrounding whitespace.

    Raises:
        DataError: the file has zero bytes, so it is not a text.
    """
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise DataError(f"{path} is no UTF-8 text: it holds bytes of value 0")
    lines = content.replace(b"\r\n", b"\n")
    paragraphs = [part.strip() for part in re.split(rb"\n\s*\n", lines)]
    return [part for part in paragraphs if part]


def read_tokenizer(folder: Path) -> Any:
    """Load a tokenizer of transformers from a folder.

    Raises:
        DataError: the folder has no valid tokenizer, or transformers is not installed.
    """
    if not folder.is_dir():
        raise DataError(f"no tokenizer at {folder}; give a folder that transformers has saved")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            "tokenizers need transformers; install 'cutlayer[transformers]', or leave out "
            "tokenizer to use bytes as tokens"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(f"{folder} cannot be read as a tokenizer: {error}") from error


def cut_text(paragraphs: Sequence[Sequence[int]], length: int) -> Examples:
    """Cut paragraphs into texts of at most ``length`` tokens; the label of a token is the next one.

    A longer paragraph becomes several texts. A last text of a single token is left out, because it
    has no label.

    Args:
        paragraphs: tokens of each paragraph; bytes are tokens too.
        length: maximum number of tokens of a text.

    Returns:
        x (texts, length) int64, padded with 0; y of the same shape, -1 where there is no next
        token.
    """
    pieces = [
        part[start : start + length + 1]
        for part in paragraphs
        for start in range(0, len(part) - 1, length)
    ]
    x = np.zeros((len(pieces), length), np.int64)
    y = np.full((len(pieces), length), -1, np.int64)
    for row, piece in enumerate(pieces):
        values = np.fromiter(piece, np.int64, len(piece))
        x[row, : min(len(values), length)] = values[:length]
        y[row, : len(values) - 1] = values[1:]
    return Examples(x, y)
