"""Exports that many tests share; each is made once for all processes of a test run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from export.bundles.writer import Tier, export_bundles
from tests.lib.models import BUILD, CLASSES, IMAGE, build, example

TIERS = {"small": Tier(1, "int8"), "medium": Tier(2, "fp16"), "large": Tier(3, "int8")}
"""The tiers of :func:`small_bundles`."""


def shared_export(
    factory: pytest.TempPathFactory, name: str, export: Callable[[Path], object]
) -> Path:
    """A folder that the first process of a run exports for all of them.

    Args:
        factory: pytest's.
        name: of the folder.
        export: writes the folder that it gets as a path.

    Returns:
        The folder. Tests must not change it.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / f"shared-{name}"
    with (base / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            export(folder)
    return folder


def small_bundles(folder: Path) -> None:
    """Bundles of ``tests.lib.models:build`` for three tiers, in a new folder."""
    export_bundles(
        build(), TIERS, folder, example=example(IMAGE), classes=CLASSES, model_path=BUILD
    )
