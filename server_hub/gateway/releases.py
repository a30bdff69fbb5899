"""Releases: bundles of trained models, rolled out to devices that only predict.

A release is published to a share of the devices first, and may be taken back. Devices say which
release they run, and which one failed their own check.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import ConfigError
from edge_sdk.files import naming
from edge_sdk.protocol.release import Running

DATABASE = "releases.sqlite"
"""Name of the file that says which releases there are, and what devices run."""

_VERSION = 1
"""Version of the tables."""

_TABLES = """
CREATE TABLE releases (number INTEGER PRIMARY KEY, published TEXT NOT NULL, share REAL NOT NULL);
CREATE TABLE tiers (number INTEGER NOT NULL, tier TEXT NOT NULL, manifest TEXT NOT NULL,
                    PRIMARY KEY (tier, number));
CREATE INDEX manifests ON tiers (manifest);
CREATE TABLE devices (device TEXT PRIMARY KEY, tier TEXT NOT NULL, manifest TEXT, refused TEXT,
                      reason TEXT, said TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Offered:
    """The release that a device gets.

    Attributes:
        number: number of the release.
        manifest: hash of the manifest of the tier's bundle.
    """

    number: int
    manifest: str


@dataclass(frozen=True)
class Release:
    """A release, and what became of it.

    Attributes:
        number: number of the release; later ones have larger numbers.
        published: when it was published, in UTC.
        share: share of the devices that get it, from 0 (taken back) to 1.
        tiers: hash of the manifest by tier.
        devices: number of devices that run it.
        refused: why it failed the check of a device, by the device's name.
    """

    number: int
    published: str
    share: float
    tiers: dict[str, str]
    devices: int = 0
    refused: dict[str, str] = field(default_factory=dict)


class Releases:
    """A folder of releases: a database beside the blobs of all bundles.

    Several processes may use it at a time: what one publishes, a hub offers from then on.

    Args:
        folder: path of the folder.
        create: whether to make a folder that does not exist.

    Raises:
        ConfigError: there are no releases in the folder, or it cannot be used.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        self.folder, self.blobs = folder, BlobStore(folder / "blobs")
        path = folder / DATABASE
        if not path.is_file():
            if not create:
                raise ConfigError(
                    f"there are no releases in {folder}; publish one with: "
                    f"cutlayer release publish BUNDLES --releases {folder}"
                )
            with naming(folder):
                folder.mkdir(parents=True, exist_ok=True)
        with self._using():
            self._database = sqlite3.connect(path, timeout=5.0, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            # what devices say may be lost with the power; what the operator decides is synced
            self._database.execute("PRAGMA synchronous = NORMAL")
            with self._transaction():
                (version,) = self._database.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in filter(str.strip, _TABLES.split(";")):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA user_version = {_VERSION}")
        if version > _VERSION:
            raise ConfigError(f"{path} was written by a newer version of Cutlayer; use that one")

    # --- what the operator does -----------------------------------------------------------------

    def publish(self, bundles: Path, share: float = 1.0) -> Release:
        """Publish bundles of a trained model; nothing is published unless all of them are intact.

        Args:
            bundles: folder that ``cutlayer model export --format bundles`` wrote.
            share: share of the devices that get the release, above 0 and at most 1.

        Raises:
            BundleError: there are no bundles in the folder, or one is damaged.
            ConfigError: a bundle has no sample to check it by, the bundles are published already,
                or the share is out of range.
        """
        _check_share(share)
        index = BundleIndex.read(bundles)
        if not index.tiers:
            raise ConfigError(f"there is no bundle in {bundles}")
        manifests = {tier: index.manifest(tier) for tier in index.tiers}
        for tier, manifest in manifests.items():
            if not manifest.sample:
                raise ConfigError(
                    f"the bundle of tier {tier!r} in {bundles} has no sample, by which devices "
                    "check it; write bundles of a trained model with: "
                    "cutlayer model export RUN --format bundles"
                )
        tiers = {tier: entry.manifest for tier, entry in index.tiers.items()}
        for release in self.published():
            if release.tiers == tiers:
                raise ConfigError(
                    f"{bundles} is release {release.number} already; change who gets it with: "
                    f"cutlayer release share {release.number} SHARE"
                )
        for tier, manifest in manifests.items():
            for name in (tiers[tier], *manifest.blobs):
                self.blobs.write(index.blobs().read(name))
        with self._using(), self._transaction():
            (last,) = self._database.execute("SELECT max(number) FROM releases").fetchone()
            release = Release((last or 0) + 1, _now(), share, tiers)
            self._database.execute(
                "INSERT INTO releases VALUES (?, ?, ?)", (release.number, release.published, share)
            )
            self._database.executemany(
                "INSERT INTO tiers VALUES (?, ?, ?)", [(release.number, *t) for t in tiers.items()]
            )
        self._sync()
        return release

    def set_share(self, number: int, share: float) -> None:
        """Offer a release to another share of the devices; a larger share includes a smaller one.

        Raises:
            ConfigError: there is no such release, or the share is out of range.
        """
        _check_share(share)
        self._update_share(number, share)

    def withdraw(self, number: int) -> None:
        """Take a release back: devices get the one before when they come.

        Raises:
            ConfigError: there is no such release.
        """
        self._update_share(number, 0.0)

    def published(self) -> list[Release]:
        """All releases, the oldest first."""
        with self._using():
            return [
                Release(number, published, share, *self._details(number))
                for number, published, share in self._database.execute(
                    "SELECT number, published, share FROM releases ORDER BY number"
                )
            ]

    # --- what the hub asks ----------------------------------------------------------------------

    def tiers(self) -> list[str]:
        """Tiers that any device gets a release of."""
        with self._using():
            found = self._database.execute(
                "SELECT DISTINCT tier FROM tiers NATURAL JOIN releases WHERE share > 0"
            )
            return [tier for (tier,) in found]

    def newest(self, device: str, tier: str) -> Offered | None:
        """The newest release of a tier that a device gets; None if there is none."""
        with self._using():
            found = self._database.execute(
                "SELECT number, share, manifest FROM tiers NATURAL JOIN releases "
                "WHERE tier = ? ORDER BY number DESC",
                (tier,),
            )
            for number, share, manifest in found:
                if _draw(device, number) < share:
                    return Offered(number, manifest)
        return None

    def note(self, device: str, tier: str, said: Running) -> None:
        """Remember what a device says that it runs."""
        with self._using():
            self._database.execute(
                "INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?, ?, ?)",
                (device, tier, said.manifest, said.refused, said.reason, _now()),
            )

    # --- inside ---------------------------------------------------------------------------------

    def _details(self, number: int) -> tuple[dict[str, str], int, dict[str, str]]:
        """Manifests, number of devices, and refusals of a release."""
        select = self._database.execute
        tiers = select("SELECT tier, manifest FROM tiers WHERE number = ?", (number,)).fetchall()
        (devices,) = select(
            "SELECT count(*) FROM devices WHERE manifest IN "
            "(SELECT manifest FROM tiers WHERE number = ?)",
            (number,),
        ).fetchone()
        refused = select(
            "SELECT device, coalesce(reason, '') FROM devices WHERE refused IN "
            "(SELECT manifest FROM tiers WHERE number = ?) ORDER BY device",
            (number,),
        ).fetchall()
        return dict(tiers), devices, dict(refused)

    def _update_share(self, number: int, share: float) -> None:
        with self._using():
            changed = self._database.execute(
                "UPDATE releases SET share = ? WHERE number = ?", (share, number)
            ).rowcount
        if not changed:
            known = ", ".join(str(release.number) for release in self.published())
            raise ConfigError(f"there is no release {number} in {self.folder}; there are {known}")
        self._sync()

    def _sync(self) -> None:
        """Have what was committed survive a loss of power."""
        with self._using():
            self._database.execute("PRAGMA wal_checkpoint(FULL)")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Say in one sentence what is wrong with the database."""
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(f"{self.folder / DATABASE} cannot be used: {error}") from error


def _draw(device: str, number: int) -> float:
    """A number from 0 to below 1 for a device and a release, always the same.

    Other devices are first with every release.
    """
    digest = hashlib.sha256(f"{number}/{device}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(
            f"the share is {share:g}; it must be above 0 and at most 1 (cutlayer release withdraw "
            "takes a release back)"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
