"""Makes small changes of meaning in a Python file, one at a time.

A mutant changes one expression or statement: a comparison, an operator, a constant, a condition, or
the order of arguments; or it removes a statement or a returned value. Code without effect on the
program is never changed: docstrings, comments, annotations, log messages and other texts, and
assertions.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
}
LOGGERS = {"log", "logging", "logger", "warnings"}
TYPING = {"Literal", "TypeVar", "cast", "NewType", "Annotated"}


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        line: number of the line in which the change begins.
        before: what was there.
        after: what is there instead.
        source: the whole file with the change.
    """

    line: int
    before: str
    after: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of its lines."""
    tree = ast.parse(source)
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    data = source.encode()
    found = []
    for node, after in _changes(tree):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = f"({after})" if isinstance(node, ast.expr) else after
        changed = (data[:begin] + text.encode() + data[end:]).decode()
        before = " ".join(data[begin:end].decode().split())
        found.append(Mutant(node.lineno, before, after, changed))
    return sorted(found, key=lambda mutant: mutant.line)


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Yield the nodes to change, each with the text that replaces it."""
    for node in _meaningful(tree):
        if isinstance(node, ast.stmt):
            text = _statement(node)
            if text is not None:
                yield node, text
        elif isinstance(node, ast.expr):
            for changed in _expression(node):
                yield node, ast.unparse(changed)
        for condition in _conditions(node):
            negated = ast.UnaryOp(ast.Not(), condition)
            yield condition, ast.unparse(negated)


def _meaningful(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node that a mutant may change."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _has_no_meaning(child):
                continue
            yield child
            yield from _meaningful(child)


def _has_no_meaning(node: ast.AST) -> bool:
    """Return whether a node is text, logging, an assertion, or for type checkers only."""
    if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom | ast.Pass):
        return True
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        return True
    if isinstance(node, ast.Expr):
        return _has_no_meaning(node.value)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Call):
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            return called.value.id in LOGGERS
        return isinstance(called, ast.Name) and called.id in TYPING
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id in TYPING
    if isinstance(node, ast.FunctionDef):
        return node.name in ("__repr__", "__str__")
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    return False


def _statement(node: ast.stmt) -> str | None:
    """Return the replacement of a statement; None if it is not changed."""
    if isinstance(node, ast.Return) and not _is_none(node.value):
        return "return None"
    if isinstance(node, ast.Raise | ast.AugAssign | ast.Delete):
        return "pass"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await):
        return "pass"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript):
        return "pass"
    if isinstance(node, ast.Continue | ast.Break):
        return "pass"
    return None


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _expression(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the replacements of an expression."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[place] = COMPARISONS[type(operator)]()
            yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        if not _is_text(node.left) and not _is_text(node.right):
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *rest = node.args
        plain = not any(isinstance(a, ast.Starred) for a in (first, second))
        types = isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass")
        if plain and not types and ast.dump(first) != ast.dump(second):
            yield ast.Call(node.func, [second, first, *rest], node.keywords)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _conditions(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the conditions that decide the branch that a node takes."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        if not isinstance(node.test, ast.Constant | ast.Compare | ast.NamedExpr):
            yield node.test
    elif isinstance(node, ast.comprehension):
        yield from (c for c in node.ifs if not isinstance(c, ast.Compare))
