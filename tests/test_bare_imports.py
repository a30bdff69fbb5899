"""The trunk imports with torch, numpy and msgpack alone; the GPU check runs with little more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BLOCK = """\
import sys

BLOCKED = {
    "websockets", "cryptography", "typer", "rich", "safetensors", "matplotlib", "peft",
    "onnxscript", "executorch",
}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed on a bare machine")

sys.meta_path.insert(0, Blocker())
"""


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that cannot import packages which a bare machine lacks."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )


def test_the_block_works() -> None:
    """A blocked package cannot be imported."""
    done = run_bare("import websockets")
    assert done.returncode != 0
    assert "websockets is not installed on a bare machine" in done.stderr


def test_the_trunk_can_be_imported() -> None:
    """All modules of the trunk, the protocol and the packing import."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("server_hub/trunk", "edge_sdk/protocol")
        for path in (ROOT / folder).glob("*.py")
    )
    assert "server_hub.trunk.step" in modules
    wanted = [*modules, "export.packing.codecs", "export.cutting.split_model"]
    done = run_bare("\n".join(f"import {module}" for module in wanted))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_gpu_check_runs(tmp_path: Path) -> None:
    """The check runs in tiny sizes on the CPU; it judges exactness, but no speed of a GPU."""
    found, table = tmp_path / "found.json", tmp_path / "found.md"
    done = run_bare(
        "import torch\ntorch.cuda.is_available = lambda: False\n"
        "from benchmarks.gpu_check import main\n"
        f"sys.exit(main(['--json', {str(found)!r}, '--markdown', {str(table)!r}]))"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(found.read_text())
    assert "no GPU result" in report["environment"]["notes"]
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    exact = {name: v for name, v in verdicts.items() if "float" in name or "returned" in name}
    assert len(exact) == 12
    assert set(exact.values()) == {"ok"}
    others = [v for name, v in verdicts.items() if name not in exact]
    assert len(others) == 8
    assert set(others) == {"no verdict"}
    assert table.read_text().count("\n|") == 2 + len(verdicts)
