"""Fixtures that all tests may use, and the rule that a run leaves no files behind."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edge_sdk.bundle.index import BundleIndex
from export.cutting.split_model import WEIGHTS, SplitModel
from server_hub.logs import PlainLines, protect
from tests.lib.exports import shared_export, small_bundles
from tests.lib.leftovers import Leftovers
from tests.lib.models import build

torch.set_num_threads(1)

LEFTOVERS = pytest.StashKey[Leftovers]()


def pytest_configure(config: pytest.Config) -> None:
    """List the files of the system's temporary folder before any test runs.

    torchao makes torch's cache folder when it is imported, which happens while tests are collected.
    """
    if not hasattr(config, "workerinput"):  # only in the process that sees the whole run
        compiled = tempfile.TemporaryDirectory(prefix="cutlayer-compiled-")
        config.add_cleanup(compiled.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
        config.stash[LEFTOVERS] = Leftovers(Path(tempfile.gettempdir()))


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files of tests and of their processes are in pytest's own folder, caches too."""
    folder = str(tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setitem(os.environ, "TMPDIR", folder)
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


def pytest_collection_finish() -> None:
    """Leave what all tests share, torch above all, out of garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that left files in the system's temporary folder.

    Coverage is saved here, because xdist kills a process that takes long to exit.
    """
    if (coverage := sys.modules.get("coverage")) and (running := coverage.Coverage.current()):
        running.save()
    leftovers = session.config.stash.get(LEFTOVERS, None)
    if leftovers is not None and leftovers.found():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the files that the run left."""
    leftovers = config.stash.get(LEFTOVERS, None)
    if leftovers is not None and (found := leftovers.found()):
        terminalreporter.section("files left in the temporary folder", red=True)
        for path in found:
            terminalreporter.line(str(path))


@pytest.fixture(autouse=True)
def bound_of_log_lines() -> None:
    """The hub's log counts lines of a kind from the start of each test, not of the run."""
    logger = logging.getLogger("cutlayer.hub")
    if any(isinstance(found, PlainLines) for found in logger.filters):
        logger.filters.clear()
        protect(logger)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> BundleIndex:
    """Bundles of ``tests.lib.models:build`` for three tiers; tests must not change them."""
    return BundleIndex.read(shared_export(tmp_path_factory, "small", small_bundles))


@pytest.fixture
def model(bundles: BundleIndex) -> SplitModel:
    """The model that ``bundles`` were exported from, with its auxiliary heads."""
    model = build()
    model.load(bundles.folder / WEIGHTS)
    return model
