"""The cache of exports: what an earlier export has lowered and verified, by content.

An entry is found by a hash of everything that it was computed from, so it is never out of date.
``docs/export.md`` says what the hash covers, and what is computed anew in any case.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import edge_sdk
import export
from edge_sdk.bundle.store import write_atomically
from edge_sdk.files import home_folder

LIMIT = 512 * 2**20
"""Largest size of all entries in bytes; those that were used longest ago are removed."""

_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "executorch", "numpy")

_HASH = 32
"""Bytes of sha256, which an entry begins with."""

logger = logging.getLogger("cutlayer.export")


def digest(*parts: str | bytes) -> str:
    """Hexadecimal sha256 of parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()


class ExportCache:
    """A folder of entries, which any number of exports may use at the same time.

    Entries are written to another file, and renamed. An entry begins with the hash of its key and
    content; one that does not match is removed with a warning, and computed again. A cache that
    cannot be read or written is like an empty one: it never makes an export fail.

    Entries are in a folder for the versions and the processor that made them
    (:func:`environment`). The folders of others are removed.

    Args:
        folder: folder of the cache; made when the first entry is written.
        limit: largest size of all entries in bytes.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder / environment()
        self._limit = limit
        with suppress(OSError):
            for other in folder.iterdir():
                if other != self.folder and len(other.name) == len(self.folder.name):
                    shutil.rmtree(other, ignore_errors=True)

    @classmethod
    def of_user(cls) -> ExportCache | None:
        """The cache of the user, ``cutlayer/exports`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

        None if neither is known.
        """
        given, home = os.environ.get("XDG_CACHE_HOME", ""), home_folder()
        if Path(given).is_absolute():  # others are to be ignored, the specification says
            return cls(Path(given) / "cutlayer" / "exports")
        return None if home is None else cls(home / ".cache" / "cutlayer" / "exports")

    def get(self, key: str) -> bytes | None:
        """The content of an entry; None if there is none, or if it is damaged."""
        path = self.folder / key
        try:
            data = path.read_bytes()
        except OSError:
            return None
        content = data[_HASH:]
        if data[:_HASH] != _sealed(key, content):
            logger.warning("the cached export %s is damaged, and is computed again", path)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return content

    def put(self, key: str, content: bytes) -> None:
        """Write an entry, and remove old ones beyond the limit; a huge one is not written."""
        if len(content) > self._limit // 2:
            return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / key, _sealed(key, content) + content)
            self._shrink()

    def _shrink(self) -> None:
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another export has removed it
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        size = 0
        for _, taken, path in sorted(found, reverse=True):
            size += taken
            if size > self._limit:
                path.unlink(missing_ok=True)


def _sealed(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


def environment() -> str:
    """Hash of what any entry depends on: Cutlayer's code, versions of libraries, the processor.

    Kernels, and how they round, depend on the processor. Packages with models are not here: what
    their code computes is traced, and executed eagerly, in every export.
    """
    return digest(
        *_sources(),
        *(f"{name} {_version(name)}" for name in _PACKAGES),
        platform.python_version(),
        platform.platform(),
        _processor(),
    )[:40]


def _sources() -> Iterable[bytes]:
    """The code of the packages that export and run graphs."""
    for package in (edge_sdk, export):
        (root,) = package.__path__
        for path in sorted(Path(root).rglob("*.py")):
            yield path.relative_to(root).as_posix().encode()
            yield path.read_bytes()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return "\n".join(sorted({n for n in lines if n.startswith(("model name", "flags"))}))
    return platform.processor()
