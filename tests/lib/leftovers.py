"""Finds files that a run of tests left in the system's temporary folder."""

from __future__ import annotations

from pathlib import Path

PREFIXES = ("cutlayer", ".cutlayer", "pymp-", "torchinductor_", "torch_")
"""Prefixes of temporary files of Cutlayer, multiprocessing and torch."""


class Leftovers:
    """Finds files that are new in a folder since this object was created.

    Other programs use the folder as well, so only names with known prefixes count.

    Args:
        folder: the system's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = self._present()

    def _present(self) -> set[Path]:
        return {path for path in self.folder.iterdir() if path.name.startswith(PREFIXES)}

    def found(self) -> list[Path]:
        """New files and folders."""
        return sorted(self._present() - self.before)
