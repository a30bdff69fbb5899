"""Finds files that a run of tests left in the system's temporary folder."""

from __future__ import annotations

from pathlib import Path

PREFIXES = ("cutlayer", ".cutlayer", "pymp-", "torchinductor_", "torch_")
"""How temporary files of ours, of multiprocessing and of torch are called."""


class Leftovers:
    """What is new in a folder since this object was made.

    Other programs use the folder as well, so only names that ours give are looked at.

    Args:
        folder: the system's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = self._present()

    def _present(self) -> set[Path]:
        return {path for path in self.folder.iterdir() if path.name.startswith(PREFIXES)}

    def found(self) -> list[Path]:
        """Files and folders that were not there before."""
        return sorted(self._present() - self.before)
