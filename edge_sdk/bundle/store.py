"""A folder of blobs, addressed by sha256 and verified when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows, where devices do not share a cache
    fcntl = None  # type: ignore[assignment]

from edge_sdk.errors import BundleError
from edge_sdk.files import expanded, home_folder, naming


def sha256(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def verify_blob(name: str, data: bytes) -> bytes:
    """Return ``data`` if its sha256 is ``name``; else raise :class:`BundleError`."""
    found = sha256(data)
    if found != name:
        raise BundleError(
            f"blob {name[:12]}… has sha256 {found[:12]}…: it was changed or damaged; "
            "delete it and fetch the bundle again"
        )
    return data


class BlobWriter:
    """A blob that is written in pieces; see :meth:`BlobStore.writing`.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are not copied."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def name(self) -> str:
        """The sha256 of the bytes so far."""
        return self._hash.hexdigest()


class BlobStore:
    """A folder of blobs, one file each, named by sha256. Writes are atomic.

    The folder is made when the first blob is written.

    An unfinished download is ``HASH.part``; :meth:`partial` returns its size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def cache(cls, folder: str | Path | None) -> BlobStore | None:
        """Return the cache of a device: a folder, or ``~/.cache/cutlayer``.

        None is returned if no folder is given and the home folder is not known.

        Raises:
            BundleError: the folder is a file, or lies in one.
        """
        if folder is not None:
            given = expanded(folder)
            there = next(path for path in (given, *given.parents) if path.exists())
            if not there.is_dir():
                raise BundleError(f"{given} is no folder, or lies in a file; choose another")
            return cls(given)
        home = home_folder()
        return None if home is None else cls(home / ".cache" / "cutlayer")

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        """The verified content of a blob; :class:`BundleError` if missing or changed."""
        try:
            data = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise BundleError(
                f"blob {name[:12]}… is missing from {self.folder}; export the bundle again"
            ) from None
        return verify_blob(name, data)

    def piece(self, name: str, offset: int, size: int) -> tuple[bytes, int] | None:
        """Up to ``size`` bytes of a blob from ``offset`` on, not verified, and its whole size.

        Returns:
            None if the blob is not here, or ends before ``offset``.
        """
        try:
            with open(self.folder / name, "rb") as file:
                whole = os.fstat(file.fileno()).st_size
                if offset > whole:
                    return None
                file.seek(offset)
                return file.read(size), whole
        except OSError:
            return None

    def write(self, data: bytes) -> str:
        """Store a blob and return its name."""
        name = sha256(data)
        if name not in self:
            self._make_folder()
            write_atomically(self.folder / name, data)
        return name

    @contextmanager
    def writing(self) -> Iterator[BlobWriter]:
        """Store a blob in pieces: it is named, and appears, when the block ends without an error.

        Yields:
            The blob, whose name is known after the block.
        """
        self._make_folder()
        temporary = self.folder / f".write-{secrets.token_hex(8)}"
        try:
            with naming(self.folder), open(temporary, "xb") as file:
                blob = BlobWriter(file)
                yield blob
                file.flush()
                os.fsync(file.fileno())
            if blob.name not in self:
                with naming(self.folder / blob.name):
                    os.replace(temporary, self.folder / blob.name)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a blob, if it exists."""
        (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Claim unfinished downloads for this process; False if another process has them."""
        if fcntl is None:
            yield True
            return
        self._make_folder()
        with open(self.folder / ".lock", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    def partial(self, name: str) -> int:
        """Bytes of an unfinished download that are already here."""
        part = self.folder / f"{name}.part"
        return part.stat().st_size if part.is_file() else 0

    def append(self, name: str, data: bytes) -> None:
        """Append a piece to an unfinished download."""
        self._make_folder()
        part = self.folder / f"{name}.part"
        with naming(part), open(part, "ab") as file:
            file.write(data)

    def finish(self, name: str) -> bytes:
        """Verify a finished download, store it as a blob and return it.

        Raises:
            BundleError: the content does not match; the partial file is removed.
        """
        part = self.folder / f"{name}.part"
        data = part.read_bytes() if part.is_file() else b""
        try:
            verify_blob(name, data)
        except BundleError:
            part.unlink(missing_ok=True)
            raise
        write_atomically(self.folder / name, data)
        part.unlink(missing_ok=True)
        return data

    def _make_folder(self) -> None:
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        OSError: the file cannot be written; the old one, if any, is unchanged.
    """
    temporary = path.with_name(f".write-{secrets.token_hex(8)}")
    try:
        with naming(path), open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with naming(path):
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
