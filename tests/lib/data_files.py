"""Writes examples in every format that a device reads."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples


def npy_bytes(array: Array) -> bytes:
    """The content of an ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_npz(folder: Path, data: Examples) -> Path:
    """An ``.npz`` file that can be mapped."""
    np.savez(folder / "a.npz", x=data.x, y=data.y)
    return folder / "a.npz"


def write_compressed(folder: Path, data: Examples) -> Path:
    """An ``.npz`` file that cannot be mapped."""
    np.savez_compressed(folder / "b.npz", x=data.x, y=data.y)
    return folder / "b.npz"


def write_npy(folder: Path, data: Examples) -> Path:
    """Two ``.npy`` files in a folder, the inputs in Fortran's order."""
    np.save(folder / "x.npy", np.asfortranarray(data.x))
    np.save(folder / "y.npy", data.y)
    return folder


def write_csv(folder: Path, data: Examples) -> Path:
    """A CSV file with a column for each number of a flat input."""
    flat = data.x.reshape(len(data), -1)
    with (folder / "a.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["y", *(f"f{i}" for i in range(flat.shape[1]))])
        table.writerows([y, *map(float, x)] for x, y in zip(flat, data.y, strict=True))
    return folder / "a.csv"


def write_json_csv(folder: Path, data: Examples) -> Path:
    """A CSV file with inputs as JSON, the mark of Windows at its start, and no end at its end."""
    lines = [f'"{json.dumps(x.tolist())}",{y}' for x, y in zip(data.x, data.y, strict=True)]
    (folder / "b.csv").write_bytes(b"\xef\xbb\xbfx,label\r\n" + "\r\n".join(lines).encode())
    return folder / "b.csv"


def write_jsonl(folder: Path, data: Examples) -> Path:
    """JSON lines, with an empty one."""
    lines = [
        json.dumps({"x": x.tolist(), "y": y.tolist()}) for x, y in zip(data.x, data.y, strict=True)
    ]
    lines.insert(1, "")
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "a.jsonl"


def write_sqlite(folder: Path, data: Examples) -> Path:
    """A database with inputs as ``.npy``, among them rows that were deleted."""
    path = folder / "a.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, y, x BLOB)")
        database.execute("CREATE TABLE other (z)")
        database.executemany(
            "INSERT INTO rows (y, x) VALUES (?, ?)",
            [
                (cell, npy_bytes(x))
                for x, y in zip(data.x, data.y, strict=True)
                for cell in (99, int(y) if y.ndim == 0 else json.dumps(y.tolist()))
            ],
        )
        database.execute("DELETE FROM rows WHERE y = 99")
        database.commit()
    return path


def write_number_sqlite(folder: Path, data: Examples) -> Path:
    """A database with a column for each number of a flat input."""
    path, flat = folder / "b.db", data.x.reshape(len(data), -1)
    names = [f'"f {i}"' for i in range(flat.shape[1])]
    with closing(sqlite3.connect(path)) as database:
        database.execute(f'CREATE TABLE "my rows" (label INTEGER, {", ".join(names)})')
        places = ", ".join("?" * (1 + len(names)))
        rows = [(int(y), *map(float, x)) for x, y in zip(flat, data.y, strict=True)]
        database.executemany(f'INSERT INTO "my rows" VALUES ({places})', rows)
        database.commit()
    return path


def write_arrays(folder: Path, data: Examples) -> Path:
    """A folder of ``.npy`` files with a list of labels."""
    lines = ["file,y"]
    for row, (x, y) in enumerate(zip(data.x, data.y, strict=True)):
        np.save(folder / f"{row}.npy", x)
        lines.append(f"{row}.npy,{y}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


WRITERS: Sequence[Callable[[Path, Examples], Path]] = (
    write_npz, write_compressed, write_npy, write_csv, write_json_csv, write_jsonl, write_sqlite,
    write_number_sqlite, write_arrays,
)  # fmt: skip


def write_pgm(path: Path, pixels: Array) -> None:
    """A PGM or PPM file of pixels (height, width[, 3]) uint8."""
    kind = "P5" if pixels.ndim == 2 else "P6"
    height, width = pixels.shape[:2]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(f"{kind}\n# a comment\n{width} {height}\n255\n".encode() + pixels.tobytes())
