"""Folders that are written: they appear completely or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sdk.bundle.index import INDEX
from edge_sdk.files import naming
from export.errors import ExportError


@contextmanager
def folder_for(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out``, which is removed if the block raises."""
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        folder.chmod(0o755)  # as other folders; that of mkdtemp is for its owner only
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_out(out: Path, overwrite: bool, mark: str = INDEX) -> None:
    """Raise :class:`ExportError` if an export must not be written to ``out``.

    Args:
        out: folder to write.
        overwrite: whether an earlier export may be replaced.
        mark: file by which an earlier export is known.
    """
    if out.exists() and not _replaceable(out, overwrite, mark):
        raise ExportError(f"{out} exists; choose another folder, or overwrite an earlier export")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ExportError(f"{above} is a file; choose another folder than {out}")


def _replaceable(out: Path, overwrite: bool, mark: str = INDEX) -> bool:
    """Whether ``out`` is an empty folder, or with ``overwrite`` an earlier export."""
    if not out.is_dir():
        return False
    return not any(out.iterdir()) or (overwrite and (out / mark).is_file())


def put(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``, and then remove an earlier export at ``out``."""
    if not out.exists():
        folder.rename(out)
        return
    earlier = folder.with_name(f"{folder.name}-earlier")
    out.rename(earlier)
    try:
        folder.rename(out)
    except BaseException:
        earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``out`` if the block ends without an error.

    Raises:
        ExportError: ``out`` exists and is not an empty folder.
    """
    if out.exists() and not _replaceable(out, overwrite=False):
        raise ExportError(f"{out} exists; choose another folder")
    with folder_for(out) as folder:
        yield folder
        folder.replace(out)
