"""Imports go one way, server_hub -> export -> edge_sdk, and a device needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "edge_sdk": {"torch", "onnx", "safetensors", "sklearn", "matplotlib", "export", "server_hub"},
    "export": {"server_hub"},
}
ALLOWED = {"edge_sdk/runtime/executorch_binding.py": {"torch"}}
"""ExecuTorch's Python binding uses torch tensors; it is imported when such a bundle is opened."""


def imports(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    """No file of a package imports a package above its own."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        wrong = imports(path) & FORBIDDEN[package] - ALLOWED.get(str(path.relative_to(ROOT)), set())
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_protocol_does_no_io() -> None:
    """The protocol imports neither sockets nor an event loop nor a clock."""
    for path in (ROOT / "edge_sdk" / "protocol").glob("*.py"):
        assert not imports(path) & {"asyncio", "socket", "websockets", "time", "threading"}, path


@pytest.mark.parametrize(
    "code",
    [
        "import edge_sdk, edge_sdk.cli, edge_sdk.runtime.onnx, edge_sdk.runtime.executorch",
        "import edge_sdk.runtime.measure, edge_sdk.cli.bundle, edge_sdk.bundle.signing",
        "import edge_sdk.cli.main; import sys; sys.argv = ['cutlayer', '--help']\n"
        "try: edge_sdk.cli.main.main()\nexcept SystemExit: pass",
    ],
)
def test_a_device_never_imports_torch(code: str) -> None:
    """Neither the SDK nor the help of its command imports torch."""
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hub_imports_no_compilers() -> None:
    """They take longer to import than all else that a hub needs, and a hub lowers nothing."""
    check = (
        "import sys, server_hub.hub\n"
        "found = {'torch._dynamo', 'onnx', 'onnxscript', 'sympy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
