"""An app that collects: rows arrive in its database while the device trains on them.

A camera, played by a thread, sees handwritten digits and stores them in SQLite; what is older than
a minute is deleted. The device trains on the newest rows. A fifth of them is kept back and measures
the model at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from edge_sdk import Device, Examples, Recent, RoundReport, SqliteTable

KEPT_S = 60.0
"""Seconds after which the app deletes a row."""

FIRST = 30
"""Rows that are there when training begins."""


def create(path: Path) -> None:
    """Make an empty database, in which the device can read while the app writes."""
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(
            "CREATE TABLE digits (id INTEGER PRIMARY KEY, x BLOB, y INTEGER, time REAL)"
        )


def store(path: Path, x: np.ndarray, y: int) -> None:
    """Store a digit (1, 8, 8) float32 with its label, and delete what is old."""
    file = io.BytesIO()
    np.save(file, x)
    now = time.time()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "INSERT INTO digits (x, y, time) VALUES (?, ?, ?)", (file.getvalue(), y, now)
        )
        database.execute("DELETE FROM digits WHERE time < ?", [now - KEPT_S])


def watch(path: Path, digits: Examples, per_second: float, stop: threading.Event) -> None:
    """Play the camera until it has seen all digits, or ``stop`` is set."""
    for x, y in zip(digits.x, digits.y, strict=True):
        if stop.wait(1 / per_second):
            return
        store(path, x, int(y))


async def train(url: str, token: str, database: Path, cache: Path) -> None:
    """Train on what is in the database until the hub's job is over, and measure the result."""
    async with await Device.connect(
        url,
        token=token,
        data=Recent(SqliteTable(database), rows=1000, age_s=KEPT_S),
        keep_back=0.2,
        cache=cache,
    ) as device:

        def show(report: RoundReport) -> None:
            print(
                f"round {report.round:2}: {report.samples} rows, loss {report.loss:.3f}", flush=True
            )

        await device.train(show)
        result = await device.evaluate(device.kept_back())
        print(f"{result.samples} rows kept back: {result.ensemble:.0%} with the hub's help")


def main() -> None:
    """Collect and train at the same time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="address of the hub")
    parser.add_argument("--token", required=True, help="this device's token")
    parser.add_argument("--digits", type=Path, default="work/device-0.npz", help="what it will see")
    parser.add_argument("--database", type=Path, default="work/app.sqlite")
    parser.add_argument("--cache", type=Path, default="work/cache")
    parser.add_argument("--per-second", type=float, default=25.0, help="digits that it sees")
    given = parser.parse_args()
    create(given.database)
    digits = Examples.from_npz(given.digits)
    for row in range(FIRST):  # a device needs something to begin with
        store(given.database, digits.x[row], int(digits.y[row]))
    stop, later = threading.Event(), digits.read(np.arange(FIRST, len(digits)))
    camera = threading.Thread(target=watch, args=(given.database, later, given.per_second, stop))
    camera.start()
    try:
        asyncio.run(train(given.url, given.token, given.database, given.cache))
    finally:
        stop.set()
        camera.join()


if __name__ == "__main__":
    main()
