"""Files with a row a line as sources: CSV and JSON lines."""

from __future__ import annotations

import copy
import csv
import json
import logging
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.files import why
from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.columns import Columns, Row, key_of
from edge_sdk.training.data import Examples, Source

log = logging.getLogger("cutlayer.device")

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**20
"""Bytes that are read at a time to find lines."""


class _Handle:
    """An open file. It stays readable when its name goes to another file.

    Attributes:
        file: device and number of the file.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        status = os.fstat(self._descriptor)
        self.file = status.st_dev, status.st_ino

    def read(self, offset: int, size: int) -> bytes:
        """At most so many bytes from ``offset`` on."""
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, size)


class _Index(NamedTuple):
    """Where the rows of a file are.

    Attributes:
        lines: number of each row's line, from 1 on.
        offsets: where each line begins, in bytes.
        sizes: its bytes, without its end.
        hashes: hash of its content.
        keys: key of each row.
        times: when each row came, in seconds since 1970; 0 if the file does not say.
        end: where the last line with an end ends.
        line: number of that line.
    """

    lines: Array
    offsets: Array
    sizes: Array
    hashes: Array
    keys: Array
    times: Array
    end: int = 0
    line: int = 0


_NONE = np.zeros(0, np.int64)
_NOTHING = _Index(_NONE, _NONE, _NONE, _NONE, _NONE, np.zeros(0))


class LineFile(Source):
    """A file with a row a line. An app may append lines, or put another file in its place.

    :class:`Columns` says what the columns hold. Opening looks through the file once and remembers
    where lines begin (48 bytes a row); a snapshot looks at what was appended. Lines are read when
    they are asked for. A row's key is its ``id``, or its content if there is none.

    An app that appends writes whole lines, with their end. A last line without an end that is not
    complete is left out until it is. A line that was overwritten since the snapshot counts as
    deleted; a file that was replaced by another of the same name stays readable.

    Args:
        path: the file, in UTF-8.

    Raises:
        DataError: the file cannot be read, or has no labels or no inputs.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._open()

    def __len__(self) -> int:
        return len(self._index.lines)

    def read(self, rows: Array) -> Examples:
        """The rows with these numbers; those that are no longer in the file are left out."""
        there, cells = [], []
        for row in map(int, rows):
            content = self._handle.read(int(self._index.offsets[row]), int(self._index.sizes[row]))
            if key_of(content) == self._index.hashes[row]:
                there.append(row)
                cells.append(self._cells(content, self.where(row)))
        return self._columns.examples(cells, lambda n: self.where(there[n]))

    def keys(self) -> Array:
        return self._index.keys

    def times(self) -> Array:
        """The column ``time``; :class:`DataError` if there is none."""
        if self._columns.time is None:
            raise DataError(f"{self._path} has no column time, so its rows have no age")
        return self._index.times

    def where(self, row: int) -> str:
        return f"{self._path}, line {self._index.lines[row]}"

    def snapshot(self) -> Self:
        """The lines that the file has now."""
        later = copy.copy(self)
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {why(error)}") from error
        same = (status.st_dev, status.st_ino) == self._handle.file
        if same and status.st_size >= self._index.end > 0:
            later._look(status.st_size)
        else:
            later._open()
        return later

    @abstractmethod
    def _begin(self, first: bytes) -> tuple[Columns, bool]:
        """The columns, by the first line, and whether it is a header and no row."""

    @abstractmethod
    def _cells(self, content: bytes, where: str) -> Row:
        """The cells of a line in the order of the columns; :class:`DataError` if it is no row."""

    def _open(self) -> None:
        """Look through the whole file."""
        try:
            self._handle = _Handle(self._path)
            size = os.stat(self._path).st_size
        except FileNotFoundError:
            raise DataError(f"no data at {self._path}") from None
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {why(error)}") from error
        self._index, self._known = _NOTHING, False
        self._look(size)
        if not self._known:
            raise DataError(f"{self._path} is empty")

    def _look(self, size: int) -> None:
        """Make an index that goes on from the last line with an end to ``size`` bytes."""
        old, added = self._index, []
        end, number = old.end, old.line
        for offset, content in self._raw_lines(end, size):
            line = content.rstrip(b"\r\n")
            if offset == 0 and line.startswith(_BOM):
                offset, line = len(_BOM), line.removeprefix(_BOM)
            ended = content.endswith(b"\n")
            if line.strip():
                is_row = True
                if not self._known:
                    self._columns, header = self._begin(line)
                    self._known, is_row = True, not header
                if is_row and (row := self._row(number + 1, offset, line, ended)):
                    added.append(row)
            if ended:
                end, number = end + len(content), number + 1
        keep = int(np.searchsorted(old.offsets, old.end))
        new = list(zip(*added, strict=True)) if added else [()] * 6
        lines, offsets, sizes, hashes, keys, times = (
            np.concatenate([before[:keep], np.array(now, before.dtype)])
            for before, now in zip(old[:6], new, strict=True)
        )
        self._index = _Index(lines, offsets, sizes, hashes, keys, times, end, number)

    def _row(
        self, number: int, offset: int, line: bytes, ended: bool
    ) -> tuple[int, int, int, int, int, float] | None:
        """A row for the index; None if its line has no end and is not complete."""
        own, time = key_of(line), 0.0
        key = own
        if not ended or self._columns.id is not None or self._columns.time is not None:
            where = f"{self._path}, line {number}"
            try:
                cells = self._cells(line, where)
                if not ended:
                    self._columns.examples([cells], lambda _: where)
                time = self._columns.time_of(cells, where)
            except DataError:
                if ended:
                    raise
                log.warning("%s is not complete yet and is left out", where)
                return None
            if self._columns.id is not None:
                key = key_of(str(cells[self._columns.id]).encode())
        return number, offset, len(line), own, key, time

    def _raw_lines(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each line from ``start`` to ``end``, with its end if it has one."""
        rest, at = b"", start
        while at + len(rest) < end:
            chunk = self._handle.read(at + len(rest), min(_CHUNK, end - at - len(rest)))
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield at, line + b"\n"
                at += len(line) + 1
        if rest:
            yield at, rest


class CsvFile(LineFile):
    """A CSV file with commas, whose first line names the columns; see :class:`LineFile`.

    A cell holds no line end.
    """

    def _begin(self, first: bytes) -> tuple[Columns, bool]:
        names = self._parsed(first, f"{self._path}, line 1")
        return Columns.of([name.strip() for name in names], f"{self._path}, line 1,"), True

    def _cells(self, content: bytes, where: str) -> Row:
        cells = self._parsed(content, where)
        if len(cells) != len(self._columns.names):
            raise DataError(
                f"{where} has {len(cells)} cells, the first line names "
                f"{len(self._columns.names)} columns"
            )
        return cells

    def _parsed(self, content: bytes, where: str) -> list[str]:
        try:
            (cells,) = csv.reader([content.decode()], strict=True)
        except (csv.Error, ValueError) as error:
            raise DataError(f"{where} is no line of CSV in UTF-8: {error}") from error
        return cells


class JsonLines(LineFile):
    """A file with a JSON object a line, all with the same keys; see :class:`LineFile`.

    With a key ``x``, keys that mean nothing here are ignored.
    """

    def _begin(self, first: bytes) -> tuple[Columns, bool]:
        where = f"{self._path}, line 1"
        return Columns.of(list(self._parsed(first, where)), where), False

    def _cells(self, content: bytes, where: str) -> Row:
        found, names = self._parsed(content, where), self._columns.names
        missing = [name for name in self._used if name not in found]
        other = [name for name in found if name not in names]
        if missing:
            raise DataError(f"{where} has no {missing[0]!r}, which the first line has")
        if other and self._columns.x is None:
            raise DataError(f"{where} has {other[0]!r}, which the first line does not have")
        return [found.get(name) for name in names]

    @property
    def _used(self) -> list[str]:
        c = self._columns
        used = [n for n in (c.label, c.x, *c.features, c.id, c.time) if n is not None]
        return [c.names[n] for n in used]

    def _parsed(self, content: bytes, where: str) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise DataError(f'{where} is no JSON object, such as {{"x": [0.5, 1], "y": 3}}')
        return found
