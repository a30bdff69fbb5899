"""The rooms of edge_sdk: imports run from the top to the bottom, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_sdk

PACKAGE = Path(edge_sdk.__file__).parent

LEVELS = (
    {"errors", "config", "protocol"},
    {"bundle"},
    {"runtime"},
    {"transport"},
    {"training"},
    {"inference"},
    {"device"},
    {"cli"},
)
"""Rooms from bottom to top; a room may import those of its own level and below."""

APART = {("transport", "runtime"), ("runtime", "transport")}
"""Moving bytes and running graphs know nothing of each other."""


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
FACE = "edge_sdk"
"""The package itself names what it hands on, and imports it when it is used."""


def imports(path: Path, own: str) -> Iterator[str]:
    """Modules of edge_sdk that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{own} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            if name in MODULES and name != FACE:
                yield name


IMPORTS = {
    name: set(imports(path, name)) - {name} for name, path in MODULES.items() if name != FACE
}


def level_of(module: str) -> int:
    """Which level a module is on."""
    room = module.split(".")[1]
    (level,) = [i for i, rooms in enumerate(LEVELS) if room in rooms]
    return level


def test_every_module_is_in_a_room() -> None:
    assert len(MODULES) > 30
    for module in IMPORTS:
        level_of(module)


def test_imports_run_down() -> None:
    """From a room to those below it, also inside functions and for types."""
    for module, imported in IMPORTS.items():
        for other in imported:
            assert level_of(other) <= level_of(module), f"{module} imports {other} above it"
            pair = module.split(".")[1], other.split(".")[1]
            assert pair not in APART, f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    """No module imports itself by way of others."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


LIGHT = [
    "edge_sdk",
    *sorted(name for name in MODULES if name.startswith("edge_sdk.protocol")),
    "edge_sdk.bundle.manifest",
    "edge_sdk.bundle.store",
    "edge_sdk.training.data",
    "edge_sdk.training.text",
    "edge_sdk.training.conditions",
    "edge_sdk.inference.metrics",
]


@pytest.mark.parametrize("missing", ["websockets", "cryptography", "onnxruntime"])
def test_what_needs_neither_network_nor_keys_nor_runtime(missing: str) -> None:
    """These modules import where a library for something else is missing; others say which."""
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
