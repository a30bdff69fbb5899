"""A folder of images with labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.files import why
from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.columns import LABELS, key_of
from edge_sdk.sources.images import PICTURES, decode_bytes
from edge_sdk.training.data import Examples, Source

CLASSES = "classes.txt"
TABLE = "labels.csv"
_FILES = PICTURES | {".npy"}


class ImageFolder(Source):
    """Images in a folder per class, or images that ``labels.csv`` lists. Images may come and go.

    ``labels.csv`` has the columns ``file``, relative to the folder, and ``y`` or ``label``. Images
    are (channels, height, width) float32 from 0 to 1; an ``.npy`` file is taken as it is. An image
    is read when it is asked for.

    Labels are numbers, or names that stand in ``classes.txt``, one a line: the first is class 0.
    Names are never numbered by what a folder happens to hold, because all devices have to number
    the classes alike.

    Args:
        path: the folder.
        classes: names of the classes in order, instead of ``classes.txt``.

    Raises:
        DataError: there are no images, or a label is neither a number nor the name of a class.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None) -> None:
        self._path, self._given = Path(path), classes
        try:
            names = _listed(self._path / CLASSES) if classes is None else list(classes)
            listed = (self._path / TABLE).is_file()
            found = list(_from_table(self._path) if listed else _from_folders(self._path))
        except NotADirectoryError:
            raise DataError(f"{self._path} is no folder") from None
        except FileNotFoundError as error:
            raise DataError(f"no folder of images at {error.filename}") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self._path} cannot be read: {error}") from error
        numbers = {name: number for number, name in enumerate(names)}
        self._files = [file for file, _, _ in found]
        self._y = np.array([self._number(*entry[1:], numbers) for entry in found], np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rows: Array) -> Examples:
        """The images with these numbers, with their labels."""
        x: list[Array] = []
        there: list[int] = []
        for row in rows:
            path = self._path / self._files[row]
            try:
                image = decode_bytes(path.read_bytes(), str(path))
            except FileNotFoundError:
                continue  # it has been deleted
            except OSError as error:
                raise DataError(f"{path} cannot be read: {why(error)}") from error
            if x and image.shape != x[0].shape:
                raise DataError(
                    f"{path} has shape {list(image.shape)}, {self.where(there[0])} has "
                    f"{list(x[0].shape)}; all images must have the same size and channels"
                )
            x.append(image)
            there.append(int(row))
        if not x:
            return Examples(np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
        return Examples(np.stack(x), self._y[there])

    def keys(self) -> Array:
        """Hashes of the files' names, with that of their folder."""
        return np.array([key_of(os.fsencode(file)) for file in self._files], np.int64)

    def times(self) -> Array:
        """When the files were changed last; 0 for those that have been deleted."""
        return np.array([_modified(self._path / file) for file in self._files], np.float64)

    def where(self, row: int) -> str:
        return str(self._path / self._files[row])

    def snapshot(self) -> ImageFolder:
        """The images that the folder holds now."""
        return type(self)(self._path, self._given)

    def _number(self, label: str, where: str, numbers: dict[str, int]) -> int:
        if label in numbers:
            return numbers[label]
        if label.isascii() and label.isdigit() and not numbers:
            return int(label)
        known = f"it is not in {CLASSES}" if numbers else "it is no number"
        raise DataError(
            f"{where}: what is the number of the class {label!r}? {known}; list all classes of the "
            f"model, one a line, in {self._path / CLASSES}"
        )


def _listed(path: Path) -> list[str]:
    """The lines of a file, without empty ones; none if there is no such file."""
    if not path.exists():
        return []
    names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise DataError(f"{path} has a class twice")
    return names


def _from_folders(folder: Path) -> list[tuple[str, str, str]]:
    """File, label and place of each image, by class and name."""
    found = []
    for inner in sorted(os.listdir(folder)):
        if not inner.startswith(".") and (folder / inner).is_dir():
            files = sorted(f for f in os.listdir(folder / inner) if _is_image(f))
            found += [(f"{inner}/{file}", inner, str(folder / inner)) for file in files]
        elif _is_image(inner):
            raise DataError(
                f"{folder / inner} is in no class folder; move it into one, or list it in {TABLE}"
            )
    return found


def _from_table(folder: Path) -> list[tuple[str, str, str]]:
    """File, label and place of each line of the table."""
    path, found = folder / TABLE, []
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        names = table.fieldnames or []
        label = [name for name in LABELS if name in names]
        if "file" not in names or len(label) != 1:
            raise DataError(f"{path} needs the columns file and y (or label)")
        for row in table:
            where = f"{path}, line {table.line_num}"
            name, number = row["file"], row[label[0]]
            if not name or not number or None in row:
                raise DataError(f"{where} does not hold a file and its label")
            if not _is_image(name):
                raise DataError(f"{where}: {name} is no image ({', '.join(sorted(_FILES))})")
            found.append((name, number, where))
    return found


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _FILES and not name.startswith(".")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
