"""The rooms of the packages: imports go from top to bottom, without cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS: dict[str, tuple[set[str], ...]] = {
    "edge_sdk": (
        {"errors", "config", "files", "protocol"},
        {"bundle"},
        {"runtime"},
        {"transport"},
        {"training", "sources"},
        {"inference"},
        {"device"},
        {"cli"},
    ),
    "export": (
        {"errors", "tensor_names", "tensor_files", "out_folder", "torch_internals"},
        {"packing"},
        {"cutting"},
        {"adapters_lora", "bases"},
        {"steps"},
        {"lowering"},
        {"bundles"},
        {"formats", "planning"},
        {"cli"},
    ),
    "server_hub": (
        {"concurrency", "logs"},
        {"trunk"},
        {"aggregation"},
        {"methods"},
        {"gateway"},
        {"storage"},
        {"rounds"},
        {"reports"},
        {"config", "job"},
        {"hub", "release_server"},
        {"simulation"},
        {"demo"},
        {"cli"},
    ),
}
"""Rooms from bottom to top; a room may import those of its own level and below."""

APART = {
    ("edge_sdk.transport", "edge_sdk.runtime"),
    ("edge_sdk.runtime", "edge_sdk.transport"),
    ("server_hub.gateway", "server_hub.trunk"),
    ("server_hub.trunk", "server_hub.gateway"),
    ("server_hub.reports", "server_hub.rounds"),
    ("server_hub.reports", "server_hub.gateway"),
    ("server_hub.reports", "server_hub.methods"),
    ("server_hub.reports", "server_hub.trunk"),
}
"""Pairs of rooms that are independent: the first does not import the second."""

CIRCLES = ["edge_sdk", "export", "server_hub"]


@cache
def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by dotted name, without its lazy ``__init__``."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != package:
            found[name] = path
    return found


def imported(package: str, module: str) -> Iterator[str]:
    """Yield the modules of the package that a module imports, also in functions and for types."""
    known = modules(package)
    for node in ast.walk(ast.parse(known[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name not in known and "." in name:
                name = name.rpartition(".")[0]
            if name in known and name != module:
                yield name


@cache
def imports(package: str) -> dict[str, set[str]]:
    """Return the imports of every module within a package."""
    return {module: set(imported(package, module)) for module in modules(package)}


def room_of(module: str) -> str:
    """Return the room of a module: ``server_hub.rounds`` for ``server_hub.rounds.cut_moves``."""
    return ".".join(module.split(".")[:2])


def level_of(module: str) -> int:
    """Return the level of a module's room."""
    package, room = module.split(".")[:2]
    (level,) = [i for i, rooms in enumerate(LEVELS[package]) if room in rooms]
    return level


@pytest.mark.parametrize("package", LEVELS)
def test_every_module_is_in_a_room(package: str) -> None:
    assert len(modules(package)) > 30
    for module in modules(package):
        level_of(module)


@pytest.mark.parametrize("package", LEVELS)
def test_imports_run_down(package: str) -> None:
    """A room imports only rooms of its own level or below."""
    for module, others in imports(package).items():
        for other in others:
            assert level_of(other) <= level_of(module), f"{module} imports {other} above it"
            assert (room_of(module), room_of(other)) not in APART, f"{module} imports {other}"


@pytest.mark.parametrize("package", CIRCLES)
def test_there_is_no_circle(package: str) -> None:
    """No module imports itself through other modules."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in imports(package)[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in imports(package):
        visit(module, ())


@pytest.mark.parametrize("package", CIRCLES)
def test_files_can_be_read_in_one_sitting(package: str) -> None:
    """Files that are longer are listed here; the list should get shorter."""
    longer = {
        path.relative_to(ROOT).as_posix()
        for path in modules(package).values()
        if path.read_text("utf-8").count("\n") > 450
    }
    assert not longer
