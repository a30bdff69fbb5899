"""Arrays in ``.npz`` and ``.npy`` files, mapped into memory where the file allows it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib import format as npy

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array

_LOCAL_HEADER = 30
"""Bytes of the header of a zip's member, before its name and extra field."""


def array_names(path: Path) -> list[str]:
    """The names of the arrays of an ``.npz`` file; :class:`DataError` if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError:
        raise DataError(f"no data at {path}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error


def read_arrays(path: Path, names: Sequence[str] = ("x", "y")) -> dict[str, Array]:
    """Arrays of an ``.npz`` file by name.

    What ``numpy.savez`` has written is mapped: pages are read when they are used. A compressed
    array (``numpy.savez_compressed``) is read whole.

    Args:
        path: the file.
        names: names of the arrays.

    Raises:
        DataError: the file is not an ``.npz`` file, is damaged, or lacks one of the arrays.
    """
    missing = [name for name in names if name not in array_names(path)]
    if missing:
        raise DataError(f"{path} has no array {', '.join(missing)}; it needs {', '.join(names)}")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _member(path, archive, name) for name in names}
    # RuntimeError: the file is encrypted, or compressed with a method that Python does not support.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error


def map_array(path: Path) -> Array:
    """The array of an ``.npy`` file, mapped; :class:`DataError` if the file cannot be read."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"no data at {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is no .npy file with one array")
    return array


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    """An array of an archive, mapped if its bytes lie in the file as they are."""
    inside = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
    info = archive.getinfo(inside)
    with archive.open(inside) as member:
        if info.compress_type != zipfile.ZIP_STORED:
            return _array(npy.read_array(member, allow_pickle=False))
        version = npy.read_magic(member)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        start = member.tell()
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if size == 0 or shape == ():  # there is nothing to map
        return _array(npy.read_array(archive.open(inside), allow_pickle=False))
    if start + size > info.file_size:
        raise ValueError(f"{name} is cut off")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER:
        raise ValueError(f"{name} is cut off")
    # the local header has an extra field of its own, so its length is not that of the directory's
    name_size = int.from_bytes(header[26:28], "little")
    extra_size = int.from_bytes(header[28:30], "little")
    offset = info.header_offset + _LOCAL_HEADER + name_size + extra_size + start
    order: Literal["F", "C"] = "F" if fortran else "C"
    array: Array = np.memmap(path, dtype, "r", offset=offset, shape=shape, order=order)
    return array


def _array(read: object) -> Array:
    assert isinstance(read, np.ndarray)
    return read


def check_rows(x: Array, y: Array, where: str) -> None:
    """Check that two arrays have as many rows; :class:`DataError` names ``where``."""
    for name, array in (("x", x), ("y", y)):
        if array.ndim == 0:
            raise DataError(f"{where}: {name} is a single value; it must be an array with rows")
    if len(x) != len(y):
        raise DataError(f"{where}: x has {len(x)} rows, and y has {len(y)}")
