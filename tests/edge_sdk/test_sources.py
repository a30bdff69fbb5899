"""Every kind of source gives the rows that were written, and grows as it says."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import (
    ConfigError,
    CsvFile,
    DataError,
    Examples,
    ImageFolder,
    JsonLines,
    Recent,
    Source,
    SqliteTable,
    open_source,
)
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.local_data import LocalData
from tests.lib.collected import Collected
from tests.lib.data_files import WRITERS, npy_bytes, write_npz, write_pgm

ROWS = 23


def data() -> Examples:
    """Return rows whose values differ, in a shape that is not flat."""
    x = np.random.default_rng(0).standard_normal((ROWS, 2, 3)).astype(np.float32)
    return Examples(x, np.arange(ROWS) % 7)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """The same rows in every format."""
    return [open_source(write(tmp_path_factory.mktemp("data"), data())) for write in WRITERS]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=9), kind=st.integers(0, len(WRITERS) - 1))
def test_any_rows_are_those_of_the_array(sources: list[Source], rows: list[int], kind: int) -> None:
    """In any order, repeated or not, also from a snapshot."""
    numbers = np.array(rows, np.int64)
    want = data().read(numbers)
    for source in (sources[kind], sources[kind].snapshot()):
        assert len(source) == ROWS
        got = source.read(numbers)
        assert len(got) == len(rows)
        if rows:
            np.testing.assert_array_equal(got.x.astype(np.float32).reshape(want.x.shape), want.x)
            np.testing.assert_array_equal(got.y, want.y)
        assert len(set(source.keys().tolist())) == ROWS


def test_batches_are_those_of_the_array(sources: list[Source]) -> None:
    want = [b.y.tolist() for b in data().batches(5, np.random.default_rng(3))]
    for source in sources:
        batches = source.batches(5, np.random.default_rng(3))
        assert [batch.y.tolist() for batch in batches] == want


def test_an_npz_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    """Of 32 MiB, only the pages with the rows that were asked for come into memory."""
    rows = 2**17
    write_npz(tmp_path, Examples(np.zeros((rows, 256), np.uint8), np.zeros(rows, np.uint8)))
    before = _resident_kb()
    source = open_source(tmp_path / "a.npz")
    assert source.read(np.array([5, rows - 1])).x.shape == (2, 256)
    assert _resident_kb() - before < 8 * 2**10


def _resident_kb() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")
    return int(status.read_text("ascii").split("VmRSS:")[1].split()[0])


# --- texts and images ---------------------------------------------------------------------------


def test_texts_of_different_lengths_are_padded(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = [([5, 6, 7], [6, 7, 8]), ([9], [1]), ([2, 3], [-1, 4])]
    path.write_text("\n".join(json.dumps({"x": x, "y": y, "note": "-"}) for x, y in texts))
    got = open_source(path).read(np.array([2, 1, 0]))
    assert got.x.tolist() == [[2, 3, 0], [9, 0, 0], [5, 6, 7]]
    assert got.y.tolist() == [[-1, 4, -1], [1, -1, -1], [6, 7, 8]]


@pytest.mark.parametrize("suffix", [".pgm", ".png"])
@pytest.mark.parametrize("colour", [False, True])
def test_images_are_read_as_models_take_them(tmp_path: Path, suffix: str, colour: bool) -> None:
    """Channels first, from 0 to 1; a class is its number, or its line in classes.txt."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, *([3] if colour else [])))
    pixels = pixels.astype(np.uint8)
    for row, label in enumerate(("3", "0", "3", "10")):
        path = tmp_path / label / f"{row}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".pgm":
            write_pgm(path.with_suffix(".ppm" if colour else ".pgm"), pixels[row])
        else:
            Image = pytest.importorskip("PIL.Image")
            Image.fromarray(pixels[row]).save(path)
    source = open_source(tmp_path)
    order = [1, 3, 0, 2]  # by folder and name
    got = source.read(np.arange(4))
    want = pixels[order] / np.float32(255)
    want = want.transpose(0, 3, 1, 2) if colour else want[:, None]
    np.testing.assert_allclose(got.x, want, rtol=1e-6)
    assert got.x.dtype == np.float32
    assert got.y.tolist() == [0, 10, 3, 3]
    (tmp_path / "classes.txt").write_text("10\n3\n\n0\nanother\n")
    assert source.snapshot().read(np.arange(4)).y.tolist() == [2, 0, 1, 1]
    assert ImageFolder(tmp_path, ["0", "3", "10"]).read(np.arange(4)).y.tolist() == [0, 2, 1, 1]


def test_without_pillow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a.png").write_bytes(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"a\.png needs Pillow .* install 'cutlayer\[images\]'"):
        open_source(tmp_path).read(np.array([0]))


# --- sources that grow --------------------------------------------------------------------------


def rows_of(source: Source) -> list[int]:
    """Return the labels of all rows."""
    return source.read(np.arange(len(source))).y.tolist() if len(source) else []


FILES = {"sqlite": "a.sqlite", "csv": "a.csv", "jsonl": "a.jsonl", "images": "labels.csv"}
"""The file that says what rows there are, by format."""


class App:
    """An app that collects rows, each with a label of its own, in one of the formats that grow."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.file = folder, kind, folder / FILES[kind]
        self.rows: list[int] = []
        if kind == "sqlite":
            with closing(sqlite3.connect(self.file)) as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, y, x, time)")
        elif kind == "csv":
            self.file.write_text("x1,time,y\n")
        elif kind == "jsonl":
            self.file.write_text('{"id": "first", "x": [0], "y": 0, "time": 0}\n')
            self.rows.append(0)
        else:
            self.file.write_text("file,y\n")

    def add(self, row: int) -> None:
        """Add a row that came at second ``row``."""
        self.rows.append(row)
        if self.kind == "sqlite":
            with closing(sqlite3.connect(self.file)) as database:
                cells = row, npy_bytes(np.array([row])), row
                database.execute("INSERT INTO t (y, x, time) VALUES (?, ?, ?)", cells)
                database.commit()
            return
        if self.kind == "images":
            path = self.folder / f"{row:03}.pgm"
            write_pgm(path, np.full((1, 1), row, np.uint8))
            os.utime(path, (row, row))
        line = {
            "csv": f"{row}.5,{row},{row}",
            "jsonl": json.dumps({"id": f"n{row}", "x": [row], "y": row, "time": row}),
            "images": f"{row:03}.pgm,{row}",
        }[self.kind]
        with self.file.open("a") as file:
            file.write(line + "\n")

    def drop(self, row: int) -> None:
        """Delete a row, as an app does: in place in a database, else with a new file."""
        self.rows.remove(row)
        if self.kind == "sqlite":
            with closing(sqlite3.connect(self.file)) as database:
                database.execute("DELETE FROM t WHERE y = ?", [row])
                database.commit()
            return
        lines = self.file.read_text().splitlines(keepends=True)
        marks = {"csv": f",{row},{row}\n", "jsonl": f'"id": "n{row}"', "images": f"{row:03}.pgm"}
        kept = [line for line in lines if marks[self.kind] not in line]
        (self.folder / "new").write_text("".join(kept))
        (self.folder / "new").replace(self.file)
        if self.kind == "images":
            (self.folder / f"{row:03}.pgm").unlink()

    def open(self) -> Source:
        """Return the source."""
        return open_source(self.folder if self.kind == "images" else self.file)


@pytest.mark.parametrize("kind", FILES)
def test_a_snapshot_has_the_rows_of_its_moment(tmp_path: Path, kind: str) -> None:
    app = App(tmp_path, kind)
    for row in (3, 1, 2):
        app.add(row)
    source = app.open()
    first = source.snapshot()
    assert rows_of(first) == app.rows
    before = list(app.rows)
    for row in range(10, 20):
        app.add(row)
    second = first.snapshot()
    assert rows_of(first) == before
    assert rows_of(second) == app.rows
    assert rows_of(source.snapshot()) == app.rows
    side = dict(zip(app.rows, second.keys(), strict=True))
    app.drop(1)
    app.drop(12)
    third = second.snapshot()
    assert rows_of(third) == app.rows
    assert [side[row] for row in app.rows] == third.keys().tolist(), "a row keeps its key"
    deleted = {1, 12} if kind in ("sqlite", "images") else set()  # a replaced file is readable
    assert rows_of(second) == [row for row in side if row not in deleted]


@pytest.mark.parametrize("kind", FILES)
def test_what_is_kept_back_stays_so_while_rows_come_and_go(tmp_path: Path, kind: str) -> None:
    app = App(tmp_path, kind)
    for row in range(1, 60):
        app.add(row)
    local = LocalData(app.open(), 0.3)
    kept, trained = set(rows_of(local.kept_back())), set(rows_of(local.begin(1, 0)))
    assert kept
    assert kept | trained == set(app.rows)
    for row in range(1, 30):
        app.drop(row)
    for row in range(100, 120):
        app.add(row)
    later = set(rows_of(local.kept_back()))
    assert not later & trained
    assert not set(rows_of(local.begin(2, 0))) & kept
    assert later | set(rows_of(local.begin(2, 0))) == set(app.rows)


@pytest.mark.parametrize("kind", FILES)
def test_bounds_by_number_and_age(tmp_path: Path, kind: str) -> None:
    app = App(tmp_path, kind)
    for row in range(1, 11):
        app.add(row)
    now = [20.0]
    sources = {
        (rows, age): Recent(app.open(), rows, age, lambda: now[0])
        for rows, age in ((4, None), (None, 15.0), (3, 12.0), (3, 100.0))
    }
    got = {key: rows_of(source) for key, source in sources.items()}
    assert got[4, None] == [7, 8, 9, 10]
    assert got[None, 15.0] == [5, 6, 7, 8, 9, 10]
    assert got[3, 12.0] == [8, 9, 10]
    assert got[3, 100.0] == [8, 9, 10]
    app.add(11)
    now[0] = 22.0
    views = {key: source.snapshot() for key, source in sources.items()}
    got = {key: rows_of(view) for key, view in views.items()}
    assert got[4, None] == [8, 9, 10, 11]
    assert got[None, 15.0] == [7, 8, 9, 10, 11]
    assert got[3, 12.0] == [10, 11]
    now[0] = 999.0
    assert rows_of(views[None, 15.0]) == [7, 8, 9, 10, 11], "no row becomes too old in a round"
    assert len(views[None, 15.0].snapshot()) == 0


@settings(max_examples=30, deadline=None)
@given(
    here=st.lists(st.integers(0, 99), unique=True, max_size=20),
    rows=st.none() | st.integers(1, 9),
    age=st.none() | st.floats(0.5, 120),
)
def test_the_newest_of_any_source(here: list[int], rows: int | None, age: float | None) -> None:
    """The rows of ``here`` came at the second of their number."""
    pool = Examples(np.arange(100)[:, None], np.arange(100))
    got = rows_of(Recent(Collected(pool, here), rows, age, lambda: 100.0).snapshot())
    want = [n for n in here if age is None or n >= 100 - age]
    if rows is not None:
        want = [n for n in want if n in sorted(want)[-rows:]]
    assert got == want


@pytest.mark.parametrize("bound", [{"rows": 0}, {"age_s": 0.0}, {"age_s": float("nan")}])
def test_a_bound_has_to_be_above_zero(bound: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"is .*; it must be above 0"):
        Recent(data(), **bound)  # type: ignore[arg-type]


def test_age_needs_times(tmp_path: Path) -> None:
    for write in WRITERS[:-1]:  # files of images have a time
        folder = tmp_path / write.__name__
        folder.mkdir()
        source = open_source(write(folder, data()))
        assert len(Recent(source, rows=3)) == 3
        with pytest.raises(DataError, match=r"no age|no time"):
            Recent(source, age_s=5.0)


@pytest.mark.parametrize("kind", [CsvFile, JsonLines])
def test_a_line_counts_once_it_is_complete(
    tmp_path: Path, kind: Callable[[Path], Source], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows"
    lines = ["x1,y\n1,2\n", "3,", "4\n5,6"]
    if kind is JsonLines:
        lines = ['{"x": [1], "y": 2}\n', '{"x": [3], ', '"y": 4}\n{"x": [5], "y": 6}']
    path.write_text(lines[0] + lines[1])
    source = kind(path)
    assert rows_of(source) == [2]
    assert "is not complete yet and is left out" in caplog.text
    with path.open("a") as file:
        file.write(lines[2])
    later = source.snapshot()
    assert rows_of(later) == [2, 4, 6]
    with path.open("a") as file:
        file.write("\n" + lines[0].splitlines(keepends=True)[-1])
    assert rows_of(later.snapshot()) == [2, 4, 6, 2]
    assert rows_of(later) == [2, 4, 6]
    assert rows_of(source) == [2]
    path.write_text(lines[0])  # in place: what was there is gone
    assert rows_of(later) == [2]
    assert rows_of(later.snapshot()) == [2]


def test_rows_of_a_database_are_read_while_an_app_writes(tmp_path: Path) -> None:
    """An app in the middle of a transaction is not in the way, and neither are we."""
    app = App(tmp_path, "sqlite")
    app.add(1)
    with closing(sqlite3.connect(tmp_path / "a.sqlite", timeout=0)) as database:
        database.execute("INSERT INTO t (y, x, time) VALUES (2, '[2]', 2)")
        source = SqliteTable(tmp_path / "a.sqlite", patience_s=0.1)
        assert rows_of(source) == [1]
        database.commit()
    assert rows_of(source.snapshot()) == [1, 2]


# --- bad files ----------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Callable[[Path], Path]:
    """Return what writes a file into a folder."""

    def written(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


def npz(**arrays: Array | float) -> Callable[[Path], Path]:
    """Return what writes an ``.npz`` file."""

    def written(folder: Path) -> Path:
        np.savez(folder / "a.npz", **arrays)  # type: ignore[arg-type]
        return folder / "a.npz"

    return written


def database(*statements: str) -> Callable[[Path], Path]:
    """Return what makes a database."""

    def written(folder: Path) -> Path:
        with closing(sqlite3.connect(folder / "a.db")) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
        return folder / "a.db"

    return written


def in_folder(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Return what makes a file and gives the folder."""

    def written(folder: Path) -> Path:
        make(folder)
        return folder

    return written


def cut_off(folder: Path) -> Path:
    """Write an ``.npz`` file and lose its end."""
    path = write_npz(folder, data())
    path.write_bytes(path.read_bytes()[:-40])
    return path


def shortened(folder: Path) -> Path:
    """Write ``.npy`` files of which one has lost its end."""
    np.save(folder / "y.npy", np.zeros(9))
    np.save(folder / "x.npy", np.zeros((9, 2)))
    content = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(content[:-9])
    return folder


LINE = "x1,x2,y\n0.5,2,3\n"
BAD: list[tuple[Callable[[Path], Path], str]] = [
    (write("a.npz", b""), "a.npz cannot be read as .npz: File is not a zip file"),
    (npz(), "has no array x, y; it needs x, y"),
    (npz(x=1.0, y=np.zeros(2)), "a.npz: x is a single value"),
    (npz(x=np.zeros((2, 2)), y=3), "a.npz: y is a single value"),
    (npz(x=np.zeros((3, 2)), y=np.zeros(2)), "x has 3 rows, and y has 2"),
    (npz(x=np.zeros((3, 2))), "has no array y"),
    (npz(x=np.array([{}, {}]), y=np.zeros(2)), "cannot be read as .npz"),
    (cut_off, "cannot be read as .npz"),
    (shortened, "x.npy cannot be read as .npy"),
    (write("x.npy", npy_bytes(np.zeros((2, 2)))), "no data at .*y.npy"),
    (write("z.npy", b""), "the format of .*z.npy is not known; known are .npz"),
    (write("a.csv", ""), "a.csv is empty"),
    (write("a.csv", "0.5,2,3\n1,2,3\n"), "line 1, needs one column of labels, y or label"),
    (write("a.csv", "y,label,x\n1,1,1\n"), "y or label; it has both"),
    (write("a.csv", "y,time,id\n1,1,1\n"), "no column of inputs"),
    (write("a.csv", "y,x1,x1\n1,1,1\n"), "the column 'x1' twice"),
    (write("a.csv", LINE + "1,2\n"), "a.csv, line 3 has 2 cells, the first line names 3 columns"),
    (write("a.csv", LINE + "1,,2\n"), "a.csv, line 3: x2 is empty"),
    (write("a.csv", LINE + "1,2,\n"), "a.csv, line 3: y is empty"),
    (write("a.csv", LINE + "\n1,2,cat\n"), "a.csv, line 4: y is 'cat', which is no number"),
    (write("a.csv", LINE + "1,2,0.5\n"), "line 3: the label is 0.5; labels are integers"),
    (write("a.csv", LINE + "1,nan,1\n"), "line 3: x2 is nan; it must be a finite number"),
    (write("a.csv", LINE + '1,"2,1\n'), "line 3 is no line of CSV in UTF-8"),
    (write("a.csv", LINE.encode() + b"1,\xff,1\n"), "line 3 is no line of CSV in UTF-8"),
    (write("a.csv", 'x,y\n"[1, [2]]",1\n'), "line 2: x is no list of numbers"),
    (
        write("a.csv", 'x,y\n"[1]",1\n"[1, 2]",1\n'),
        r"line 3: x has shape \[2\], .*has \[1\]",
    ),
    (write("a.jsonl", "[1]\n"), "line 1 is no JSON object"),
    (write("a.jsonl", '{"x": [1], "y": 1}\n{\n'), "a.jsonl, line 2 is not JSON"),
    (write("a.jsonl", '{"x": [1], "y": 1}\n{"x": [1]}\n'), "line 2 has no 'y', which the first"),
    (write("a.jsonl", '{"a": 1, "y": 1}\n{"b": 1, "a": 1, "y": 1}\n'), "line 2 has 'b', which"),
    (write("a.jsonl", '{"x": "cat", "y": 1}\n'), "line 1: x is no list of numbers"),
    (write("a.jsonl", '{"x": [1], "y": true}\n'), "line 1: y is a bool; it must be a number"),
    (write("a.jsonl", '{"x": [1, 2], "y": [1]}\n'), r"x has shape \[2\] and y \[1\]"),
    (write("a.sqlite", b""), "one table of .* must have a column y or label, none does"),
    (write("a.sqlite", b"SQLite format 3\0" + b"\xff" * 500), "cannot be read as SQLite"),
    (write("a.sqlite", "no database" * 100), "cannot be read as SQLite: file is not a database"),
    (database("CREATE TABLE a (y, x)", "CREATE TABLE b (label, x)"), "several do: a, b"),
    (database("CREATE TABLE a (z)"), "none does; it has a"),
    (database("CREATE TABLE a (y)"), "table a has no column of inputs"),
    (
        database("CREATE TABLE a (y, f)", "INSERT INTO a VALUES (1, 0.5), (NULL, 1)"),
        "a.db, table a, rowid 2: y is empty",
    ),
    (
        database("CREATE TABLE a (y, x)", "INSERT INTO a VALUES (1, x'0102')"),
        "rowid 1: x is neither an image nor an .npy array: its format is not known",
    ),
    (
        database("CREATE TABLE a (id TEXT PRIMARY KEY, y, f) WITHOUT ROWID"),
        "table a has no rowid",
    ),
    (in_folder(write("0/a.pgm", b"P5 9 9 255\n1")), "a.pgm is neither an image nor .*1 of 81"),
    (in_folder(write("cat/a.pgm", b"")), "what is the number of the class 'cat'"),
    (in_folder(write("a.pgm", b"")), "a.pgm is in no class folder"),
    (in_folder(write("labels.csv", "name,y\n")), "needs the columns file and y"),
    (in_folder(write("labels.csv", "file,y\na.png\n")), "line 2 does not hold a file and its"),
    (in_folder(write("labels.csv", "file,y\na.gif,1\n")), "line 2: a.gif is no image"),
    (in_folder(write("labels.csv", "file,y\na.png,cat\n")), "line 2: what is the number of the cl"),
    (lambda folder: folder / "nothing.csv", "no data at .*nothing.csv"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_files_are_refused_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(open_source(path))
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    for row, size in enumerate((2, 2, 3)):
        write_pgm(tmp_path / "7" / f"{row}.pgm", np.zeros((size, size), np.uint8))
    with pytest.raises(DataError, match=r"2\.pgm has shape \[1, 3, 3\], .*0\.pgm has \[1, 2, 2\]"):
        rows_of(open_source(tmp_path))


def test_a_locked_database_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    path = database("CREATE TABLE a (y, f)", "INSERT INTO a VALUES (1, 1)")(tmp_path)
    source = SqliteTable(path, patience_s=0.1)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for ask in (source.snapshot, lambda: rows_of(source)):
            with pytest.raises(DataError, match=r"a\.db is locked by another program for 0\.1 s"):
                ask()


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    path = database("CREATE TABLE a (y, f)")(tmp_path)
    with pytest.raises(DataError, match="has no table 'b'"):
        SqliteTable(path, "b")
