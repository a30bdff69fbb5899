"""Modules of edge_sdk import without libraries that only other modules need."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import edge_sdk.protocol

MODULES = [f"edge_sdk.protocol.{m.name}" for m in pkgutil.iter_modules(edge_sdk.protocol.__path__)]

LIGHT = [
    "edge_sdk",
    "edge_sdk.protocol",
    *MODULES,
    "edge_sdk.bundle.manifest",
    "edge_sdk.bundle.store",
    "edge_sdk.training.data",
    "edge_sdk.training.text",
    "edge_sdk.training.conditions",
    "edge_sdk.inference.metrics",
]


@pytest.mark.parametrize("missing", ["websockets", "cryptography", "onnxruntime"])
def test_what_needs_neither_network_nor_keys_nor_runtime(missing: str) -> None:
    """These modules import without a library that others need; the others name the missing one."""
    code = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in {LIGHT!r}:
    importlib.import_module(name)
try:
    import edge_sdk.device
except ModuleNotFoundError as error:
    assert error.name.split(".")[0] == {missing!r}
else:
    assert {missing!r} == "onnxruntime", "the block does not work"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
