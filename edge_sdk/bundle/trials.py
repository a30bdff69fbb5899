"""What a device remembers of the releases that it has tried, over restarts of its process."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import BundleError
from edge_sdk.files import why

log = logging.getLogger("cutlayer.device")

_ATTEMPTS = 2
"""Times that a release may end the process while it is tried. Once may be somebody's impatience."""


class Trials:
    """The release that passed last, and the one that is being tried.

    A runtime may end the whole process when it loads a graph. The attempt is therefore written down
    before, and a release whose attempts nobody has survived is not tried again.

    Args:
        folder: folder for the file; None remembers only as long as the process lives.
        token: token of the device, which tells the files of several devices apart.

    Attributes:
        passed: sha256 of the manifest of the release that passed last; None if none did.
    """

    def __init__(self, folder: Path | None, token: str) -> None:
        name = hashlib.sha256(f"cutlayer trials {token}".encode()).hexdigest()[:32]
        self._path = None if folder is None else folder / f"trials-{name}.json"
        self.passed: str | None = None
        self._trying: str | None = None
        self._attempts = 0
        try:
            if self._path is not None:
                found = json.loads(self._path.read_bytes())
                self.passed, self._trying = found["passed"], found["trying"]
                self._attempts = int(found["attempts"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read, and is begun anew: %s", self._path, error)

    def begin(self, manifest: str) -> None:
        """A release is tried now.

        Raises:
            BundleError: the process has ended in the attempts before.
        """
        if manifest != self._trying:
            self._trying, self._attempts = manifest, 0
        if self._attempts >= _ATTEMPTS:
            raise BundleError(
                f"the process has ended {self._attempts} times while it tried this release"
            )
        self._attempts += 1
        self._write()

    def end(self, manifest: str, *, passed: bool) -> None:
        """The process has survived: the release has passed its check, or has failed it."""
        if passed:
            self.passed = manifest
        self._trying, self._attempts = None, 0
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        body = {"passed": self.passed, "trying": self._trying, "attempts": self._attempts}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(body).encode())
        except OSError as error:
            log.warning(
                "%s cannot be written: %s; after a restart the device does not know which release "
                "was good", self._path, why(error),
            )  # fmt: skip
            self._path = None
