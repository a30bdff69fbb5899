"""The structure of the tests: helpers are in ``tests/lib``, and tests check behaviour."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
PACKAGES = ("edge_sdk", "export", "server_hub")
MODULES = sorted(TESTS.rglob("*.py"))

PRIVATE_BY_NECESSITY = {
    ("tests/end_to_end/test_text_cli.py", "_ROOM"): "a message holds 16 MiB; the test needs less",
    ("tests/edge_sdk/test_metrics.py", "_CHUNK"): "parts have a MB; the test needs smaller ones",
}
"""Private names that a test uses because no public name shows the behaviour, with the reason."""

OPEN = {
    ("tests/edge_sdk/test_mixture.py", "_downloader"),
    ("tests/edge_sdk/test_mixture.py", "_connection"),
}
"""Private names whose uses are to be replaced; the list may only get shorter."""

NAMED_TUPLES = {"_replace", "_asdict", "_fields"}
"""Names that are public despite their underscore: methods of every named tuple."""


def name_of(path: Path) -> str:
    """Return the path of a file below the root of the repository."""
    return str(path.relative_to(ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text("utf-8"))


def is_private(name: str) -> bool:
    """Return whether a name starts with exactly one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names() -> set[str]:
    """Return the private functions, classes, attributes and constants of the packages."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return {name for name in found if is_private(name)} - NAMED_TUPLES


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name wherever a file reads, writes, imports or patches a private name.

    Uses through ``self`` (``self._x``) are not counted.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and is_private(node.attr):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if is_private(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Call):
            for argument in node.args:  # setattr(object, "_name", ...), patch("module._name")
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    last = argument.value.rpartition(".")[2]
                    if is_private(last) and last.isidentifier():
                        yield node.lineno, last


ADVERSARY = tuple(f"tests.adversary.{name}" for name in ("fuzzer", "peer", "scenarios"))
"""The hostile peer, which other tests of hubs may use as well."""


def test_every_test_is_in_the_folder_of_a_package() -> None:
    """Modules outside these folders test the repository as a whole."""
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._"}
    others = {"adversary", "end_to_end", "benchmarks", "inputs", "lib", "vectors"}
    assert folders == {*PACKAGES, *others}
    beside = {path.name for path in TESTS.glob("test_*.py")}
    assert beside == {
        "test_bare_imports.py",
        "test_examples.py",
        "test_install.py",
        "test_layering.py",
        "test_mutate.py",
        "test_public_names.py",
        "test_rooms.py",
        "test_structure.py",
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_from_a_test_module(path: Path) -> None:
    """Code that tests share is in ``tests/lib``."""
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            shared = name.startswith(("tests.lib", "tests.vectors.make", *ADVERSARY))
            assert shared or not name.startswith("tests."), (
                f"{name_of(path)}:{node.lineno} imports {name}; move what is shared to tests/lib"
            )


def test_the_library_holds_no_tests() -> None:
    """Every file of the library has a docstring that states its purpose."""
    files = [path for path in (TESTS / "lib").rglob("*.py") if path.name != "__init__.py"]
    assert files
    for path in files:
        tree = parsed(path)
        assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
        assert not path.name.startswith("test_")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert not node.name.startswith(("test_", "Test")), f"{name_of(path)}: {node.name}"


def test_tests_look_at_behaviour() -> None:
    """No test uses a private name of the packages, except those that are listed with a reason."""
    ours = private_names()
    assert len(ours) > 100
    for path in MODULES:
        if path == Path(__file__):
            continue
        for line, name in private_uses(parsed(path)):
            key = (name_of(path), name)
            assert name not in ours or key in PRIVATE_BY_NECESSITY or key in OPEN, (
                f"{key[0]}:{line} uses {name}; test what it does instead"
            )
