"""``docs/refusals.md`` lists the reasons of the code, and the code has the reasons of the list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "refusals.md"
FILES = (
    *("cutting/channels.py", "cutting/checks.py", "cutting/seeded_random.py"),
    "cutting/split_model.py",
    *("lowering/trace.py", "lowering/guards.py", "lowering/onnx.py", "lowering/executorch.py"),
    *("lowering/decompositions/pooling.py", "lowering/decompositions/indexing.py"),
    "steps/client_steps.py",
)
"""Files of the package whose reasons are compared."""

ERRORS = ("ExportError", "NotImplementedError")
CONSTANTS = ("_ALPHA", "_ANY_LENGTH", "_FIXED", "REPLACEMENTS")
"""Constants that hold reasons."""


def texts(node: ast.AST) -> Iterator[str]:
    """Yield the texts of an expression; what is filled in is left out as ``…``."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def reasons() -> list[str]:
    """Return the reasons for which the code refuses an export."""
    found: list[str] = []
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / "export" / name).read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if isinstance(node.exc.func, ast.Name) and node.exc.func.id in ERRORS:
                    found += texts(node.exc.args[0])
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and target.id in (*CONSTANTS, "fails"):
                    found += texts(node.value)
            elif isinstance(node, ast.FunctionDef) and node.name == "_message":
                found += texts(node.body[-1])
    words = re.compile(r"\w+ \w+ ")
    return [text for text in found if words.search(text)]


def listed() -> list[str]:
    """Return the messages in the second column of the document's tables."""
    rows = re.findall(r"^\|[^|]+\| `([^|]+)` \|", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 25
    return rows


def test_every_reason_is_listed() -> None:
    """A new reason must be added to the document."""
    assert [text for text in reasons() if not any(row in text for row in listed())] == []


def test_every_listed_reason_is_in_the_code() -> None:
    """A reason that the code no longer has must leave the document."""
    assert [row for row in listed() if not any(row in text for text in reasons())] == []


def test_the_document_is_linked() -> None:
    """Readers find it from the pages about exports and operators."""
    for name in ("export.md", "operators.md"):
        assert "(refusals.md)" in (ROOT / "docs" / name).read_text("utf-8")
