"""Decisions on symbolic sizes that tracing freezes in a graph.

Code such as ``if x.shape[1] > 32`` is traced for one example, and the graph keeps that branch for
every size. A decision is harmless if it is the same for all sizes that a graph accepts.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from export.bases import vmapped
from export.errors import ExportError

_TORCH = str(Path(torch.__file__).parent)
_ENGINE = (
    __file__,
    torch.__file__,  # SymBool.__bool__
    *(f"{_TORCH}/fx/experimental/{name}.py" for name in ("symbolic_shapes", "sym_node")),
    f"{_TORCH}/fx/experimental/recording.py",
    f"{_TORCH}/fx/experimental/_config.py",
)
"""Files whose frames only pass a decision on."""

_LAYOUT = (
    *(f"{_TORCH}/{name}" for name in ("_prims_common/", "_subclasses/")),
    vmapped.__file__,  # where torch.vmap reshapes
)
"""Code that decides on strides only, which do not change results."""

_SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 33)
"""Sizes for which decisions are examined, besides the limits and the numbers in the condition."""

_KINDS = {"batch": "the batch size", "seq": "the length of the text"}


class Shapes(ShapeEnv):
    """Shapes of a trace, which keeps every decision with the place in the code that made it.

    Attributes:
        decisions: conditions that held for the example, with the file that asked; and the line.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decisions: dict[tuple[sympy.Basic, str], int] = {}

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        """The value of an expression for the example; decisions are kept."""
        value = super().evaluate_expr(orig_expr, *args, **kwargs)
        if orig_expr.free_symbols and value in (sympy.true, sympy.false):
            held = orig_expr if value == sympy.true else sympy.Not(orig_expr)
            file, line = _place()
            self.decisions.setdefault((held, file), line)
        return value

    def check_decisions(self, names: Mapping[sympy.Symbol, str], limits: Mapping[str, int]) -> None:
        """Raise :class:`ExportError` for a decision that other sizes would make differently.

        Torch itself decides differently for sizes of 0 and 1, whose strides are free. That does
        not change results, and every graph is verified with a batch of 1.

        Args:
            names: names of the symbols.
            limits: largest size by name; the smallest is 1.
        """
        for (condition, file), line in self.decisions.items():
            torchs = file.startswith(_TORCH)
            if file.startswith(_LAYOUT) or (torchs and _is_about_one(condition)):
                continue
            for sizes in _examined(condition, names, limits, 2 if torchs else 1):
                if condition.xreplace(sizes) == sympy.false:
                    raise ExportError(_message(condition, names, sizes, file, line))


def _is_about_one(condition: sympy.Basic) -> bool:
    """Whether a condition asks if a size is 0 or 1: ``size != 1``, ``size >= 2``."""
    if not isinstance(condition, sympy.Ne | sympy.Gt | sympy.Ge | sympy.Lt | sympy.Le):
        return False
    return any(side.is_Integer and 0 <= side <= 2 for side in condition.args)


def _examined(
    condition: sympy.Basic, names: Mapping[sympy.Symbol, str], limits: Mapping[str, int], least: int
) -> Iterator[dict[sympy.Basic, sympy.Integer]]:
    """Sizes for which a condition is examined, small ones first."""
    symbols = sorted(condition.free_symbols, key=str)
    numbers = {abs(int(n)) for n in condition.atoms(sympy.Integer)}
    candidates = {*_SIZES, *(n + i for n in numbers for i in (-1, 0, 1))}
    choices = []
    for symbol in symbols:
        most = limits[names[symbol]]
        choices.append(sorted({n for n in (*candidates, most) if least <= n <= most}))
    for values in itertools.product(*choices):
        yield {s: sympy.Integer(n) for s, n in zip(symbols, values, strict=True)}


def _message(
    condition: sympy.Basic,
    names: Mapping[sympy.Symbol, str],
    sizes: Mapping[sympy.Basic, sympy.Integer],
    file: str,
    line: int,
) -> str:
    symbols = sorted(condition.free_symbols, key=str)
    said = str(condition.xreplace({s: sympy.Symbol(names[s]) for s in symbols}))
    kinds = " and ".join(_KINDS[names[s]] for s in symbols)
    example = " and ".join(f"{names[s]} = {sizes[s]}" for s in symbols)
    return (
        f"it decides on {kinds} ({Path(file).name}, line {line}): the graph would compute for "
        f"every size what is right for {said}, and {example} is another case; compute the same "
        "for every size, with torch.where or a mask"
    )


def _place() -> tuple[str, int]:
    """File and line of the code that decides."""
    frame = inspect.currentframe()
    assert frame is not None
    while frame.f_back is not None and frame.f_code.co_filename in _ENGINE:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
