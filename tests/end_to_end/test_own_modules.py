"""Modules of the working folder: found by name, and never in place of those that are installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_sdk.bundle.index import BundleIndex
from server_hub.gateway.tokens import TokenFile
from tests.lib.harness import finish, next_event
from tests.lib.hub_files import write_hub_toml

ROOT = Path(__file__).parents[2]

MINE = """
from tests.lib.models import build as plain

def build():
    model = plain()
    model.head.register_forward_hook(lambda module, inputs, output: output)
    return model
"""

ASK = """
from edge_sdk.errors import ConfigError
from export.bundles.model_source import build_model
for name in ("export:build", "secrets:build", "mine:plain", "mine:nothing", "package.mine:build"):
    try:
        print(type(build_model(name)).__name__)
    except ConfigError as error:
        print(error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with modules of the user, some with names that are taken."""
    for name in ("export", "secrets", "random", "multiprocessing"):
        (tmp_path / f"{name}.py").write_text('raise RuntimeError("a module of the user")')
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine.py").write_text(MINE)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run Python as the console script ``cutlayer`` does: the folder is not on its path."""
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_a_module_is_found_unless_its_name_is_taken(folder: Path) -> None:
    code, out, err = finish(run(folder, "-c", ASK))
    assert (code, err) == (0, "")
    export, secrets, plain, nothing, package = out.splitlines()
    assert export.startswith("export.py has the name of the module 'export' of Python, of Cutlayer")
    assert secrets.startswith("secrets.py has the name of the module 'secrets'")
    assert secrets.endswith("give the file another name")
    assert "cannot import the model 'mine:nothing'" in nothing
    assert plain == package == "SplitModel"


@pytest.mark.slow
def test_a_hub_beside_such_modules_builds_the_model_in_the_trunk_and_ends_at_ctrl_c(
    folder: Path, bundles: BundleIndex
) -> None:
    """The model holds a lambda, so it could not be sent to the trunk's process."""
    config = write_hub_toml(folder, bundles, rounds=1, devices=1)
    config.write_text(f'model = "mine:build"\n{config.read_text()}')
    TokenFile(folder / "tokens.toml").issue("phone")
    hub = run(folder, "-m", "edge_sdk.cli.main", "hub", "--config", str(config), "--json")
    next_event(hub, "ready")
    began = time.monotonic()
    hub.send_signal(signal.SIGINT)
    code, _, err = finish(hub, 20)
    assert time.monotonic() - began < 10.0
    assert code == 130
    assert "Traceback" not in err
