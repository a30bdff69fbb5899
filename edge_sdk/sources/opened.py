"""Any file or folder of data as a source, by its name."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.errors import DataError
from edge_sdk.sources.array_files import ArrayFiles
from edge_sdk.sources.image_folder import ImageFolder
from edge_sdk.sources.lines import CsvFile, JsonLines
from edge_sdk.sources.sqlite import SqliteTable
from edge_sdk.training.data import Source

FORMATS = (
    ".npz with x and y; a folder with x.npy and y.npy; .csv; .jsonl; .sqlite (.sqlite3, .db); "
    "a folder of images, CLASS/*.png or with labels.csv"
)
"""What :func:`open_source` reads, for error messages."""

_BY_SUFFIX = {
    ".npz": ArrayFiles.from_npz,
    ".csv": CsvFile,
    ".jsonl": JsonLines,
    ".sqlite": SqliteTable,
    ".sqlite3": SqliteTable,
    ".db": SqliteTable,
}


def open_source(path: str | Path) -> Source:
    """The source that a file or a folder holds.

    Raises:
        DataError: there is nothing at ``path``, it is none of :data:`FORMATS`, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "x.npy").exists() or (path / "y.npy").exists():
            return ArrayFiles.from_npy(path)
        return ImageFolder(path)
    if path.name in ("x.npy", "y.npy"):
        return ArrayFiles.from_npy(path.parent)
    if not path.exists():
        raise DataError(f"no data at {path}")
    if (kind := _BY_SUFFIX.get(path.suffix.lower())) is None:
        raise DataError(f"the format of {path} is not known; known are {FORMATS}")
    return kind(path)
