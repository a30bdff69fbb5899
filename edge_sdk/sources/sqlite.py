"""A table of an SQLite database as a source."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.sources.columns import LABELS, Columns, Row, key_of
from edge_sdk.training.data import Examples, Source

_AT_ONCE = 500
"""Rows of a query; SQLite takes at most 999 values in older versions."""


class SqliteTable(Source):
    """The rows of a table, in the order of their ``rowid``. An app may add and delete rows.

    :class:`Columns` says what the columns hold. A row's key is its ``id``, or its ``rowid`` if
    there is no column of that name. The database is opened for reading, for a moment at a time: an
    app that writes is not kept waiting. It should use the write-ahead log (``PRAGMA
    journal_mode=WAL``), and declare ``id INTEGER PRIMARY KEY``, so that VACUUM does not renumber
    rows.

    Args:
        path: the database.
        table: name of the table; by default the only one with a column of labels.
        patience_s: seconds to wait while another program has locked the database.

    Raises:
        DataError: no SQLite database, no such table, or columns that do not fit.
    """

    def __init__(
        self, path: str | Path, table: str | None = None, patience_s: float = 10.0
    ) -> None:
        self._path, self._patience = Path(path), patience_s
        with self._opened() as database:
            self._table = self._the_table(database) if table is None else table
            names = [str(row[1]) for row in database.execute(f"PRAGMA table_info({self._quoted})")]
            if not names:
                raise DataError(f"{self._path} has no table {self._table!r}")
            self._columns = Columns.of(names, self._name)
            extra = [i for i in (self._columns.id, self._columns.time) if i is not None]
            cells = ", ".join(["rowid", *(_quote(names[i]) for i in extra)])
            try:
                found = database.execute(
                    f"SELECT {cells} FROM {self._quoted} ORDER BY rowid"
                ).fetchall()
            except sqlite3.OperationalError as error:
                if "rowid" not in str(error):
                    raise
                raise DataError(f"{self._name} has no rowid; create it WITH one") from error
        self._rowids = np.array([row[0] for row in found], np.int64)
        self._keys, self._times = self._rowids, None
        if self._columns.id is not None:
            self._keys = np.array([_key(row[1]) for row in found], np.int64)
        if self._columns.time is not None:
            self._times = [row[-1] for row in found]

    def __len__(self) -> int:
        return len(self._rowids)

    def read(self, rows: Array) -> Examples:
        """The rows with these numbers; those that have been deleted are left out."""
        wanted = [int(rowid) for rowid in self._rowids[rows]]
        names = ", ".join(map(_quote, self._columns.names))
        cells: dict[int, Row] = {}
        with self._opened() as database:
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                places = ", ".join("?" * len(some))
                query = f"SELECT rowid, {names} FROM {self._quoted} WHERE rowid IN ({places})"
                cells |= {row[0]: row[1:] for row in database.execute(query, some)}
        there = [rowid for rowid in wanted if rowid in cells]
        return self._columns.examples(
            [cells[rowid] for rowid in there], lambda n: f"{self._name}, rowid {there[n]}"
        )

    def keys(self) -> Array:
        return self._keys

    def times(self) -> Array:
        """The column ``time``; :class:`DataError` if there is none, or it holds something else."""
        if self._times is None:
            raise DataError(f"{self._name} has no column time, so its rows have no age")
        for row, time in enumerate(self._times):
            if isinstance(time, str | bytes) or time is None:
                raise DataError(f"{self.where(row)}: time is {time!r}, not seconds since 1970")
        return np.array(self._times, np.float64)

    def where(self, row: int) -> str:
        return f"{self._name}, rowid {self._rowids[row]}"

    def snapshot(self) -> SqliteTable:
        """The rows that the table holds now."""
        return type(self)(self._path, self._table, self._patience)

    @property
    def _name(self) -> str:
        return f"{self._path}, table {self._table}"

    @property
    def _quoted(self) -> str:
        return _quote(self._table)

    def _the_table(self, database: sqlite3.Connection) -> str:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        names = [name for (name,) in tables if not name.startswith("sqlite_")]
        labelled = []
        for name in names:
            columns = {row[1] for row in database.execute(f"PRAGMA table_info({_quote(name)})")}
            if columns & set(LABELS):
                labelled.append(name)
        if len(labelled) != 1:
            found = f"several do: {', '.join(labelled)}" if labelled else "none does"
            raise DataError(
                f"one table of {self._path} must have a column y or label, {found}; "
                f"it has {', '.join(names) or 'no tables'}"
            )
        return str(labelled[0])

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading; what SQLite raises becomes a :class:`DataError`."""
        if not self._path.is_file():
            raise DataError(f"no data at {self._path}")
        address = f"{self._path.resolve().as_uri()}?mode=ro"
        try:
            with closing(sqlite3.connect(address, self._patience, uri=True)) as database:
                yield database
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise DataError(
                    f"{self._path} is locked by another program for {self._patience:g} s; let it "
                    "commit sooner, or use PRAGMA journal_mode=WAL"
                ) from error
            raise DataError(f"{self._path} cannot be read as SQLite: {error}") from error


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _key(cell: object) -> int:
    """The key of a row from its ``id``; an integer is its own key."""
    if isinstance(cell, int) and -(2**63) <= cell < 2**63:
        return cell
    return key_of(cell if isinstance(cell, bytes) else str(cell).encode())
