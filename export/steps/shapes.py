"""Shapes with the symbols ``batch`` and ``seq``, found by running a segment on several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from export.cutting.split_model import Task
from export.errors import ExportError

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Shapes:
    """Shapes of the inputs of a segment, and of each of its outputs, with symbols.

    Attributes:
        x: shape of the inputs.
        outputs: shapes of the outputs, such as the activations.
    """

    x: Shape
    outputs: tuple[Shape, ...]


def find_shapes(
    run: Callable[[Tensor], Sequence[Tensor]],
    example: Tensor,
    task: Task,
    *,
    one_length: bool = False,
) -> Shapes:
    """Find which axes have the size of the batch, and which the length of the text.

    Nothing is read from the sizes of one run: an axis is ``seq`` if it has the text's length for
    every length, and a number if it is the same for all. Texts of other lengths than the example's
    are possible for ``tokens``, and for two-dimensional integers where the segment takes shorter
    ones, and all outputs are (batch, seq, ...) or do not depend on the length. Otherwise the length
    is that of the example, such as behind a convolution without padding or with channels first.

    Args:
        run: computes the outputs for inputs (rows, ...), in evaluation mode.
        example: inputs (batch, ...).
        task: task of the model.
        one_length: whether texts have the example's length, whatever the segment takes.

    Raises:
        ExportError: another axis than the first depends on the number of rows; or the activations
            of a text do not have its positions as second axis.
    """
    with torch.no_grad():
        one = [tuple(h.shape) for h in run(example[:1])]
        two = [tuple(h.shape) for h in run(example[:1].repeat_interleave(2, 0))]
        for a, b in zip(one, two, strict=True):
            if a[:1] != (1,) or b != (2, *a[1:]):
                raise ExportError(
                    f"activations are {list(a)} for one row and {list(b)} for two; only the first "
                    "axis may depend on the batch, and must have its size"
                )
        texts = not example.is_floating_point() and example.dim() == 2 and not one_length
        at = {example.shape[1]: one} if texts else {}
        for length in _shorter(example.shape[1]) if texts else ():
            try:
                at[length] = [tuple(h.shape) for h in run(example[:1, :length])]
            except (RuntimeError, ValueError, IndexError):
                if task == "classes":
                    at.clear()
                    break
    fixed: list[Shape] = [("batch", *shape[1:]) for shape in one]
    if not at:
        return Shapes(("batch", *example.shape[1:]), tuple(fixed))
    symbolic = [_symbolic({n: shapes[i] for n, shapes in at.items()}) for i in range(len(one))]
    found = [shape for shape in symbolic if shape is not None]
    if task == "tokens":
        for fault, shape in zip(one, symbolic, strict=True):
            if shape is None or shape[1:2] != ("seq",):
                raise ExportError(
                    f"activations are {list(fault)} for a text of {example.shape[1]} positions; "
                    "they must be (batch, positions, channels), with a position for each token, "
                    "whatever the length"
                )
    elif len(at) < 2 or len(found) < len(one):
        return Shapes(("batch", *example.shape[1:]), tuple(fixed))
    return Shapes(("batch", "seq"), tuple(found))


def _shorter(length: int) -> list[int]:
    """Other lengths to try; halves and neighbours have other remainders."""
    return sorted({n for n in (length - 1, length // 2, length // 2 - 1, 1) if 0 < n < length})


def _symbolic(at: dict[int, tuple[int, ...]]) -> Shape | None:
    """A shape with symbols, given shapes (1, ...) by length; None if it is another function."""
    shapes = list(at.values())
    if len({len(shape) for shape in shapes}) > 1:
        return None
    result: list[int | str] = ["batch"]
    for axis in range(1, len(shapes[0])):
        sizes = {length: shape[axis] for length, shape in at.items()}
        if len(set(sizes.values())) == 1 and (len(sizes) > 1 or axis > 1):
            result.append(shapes[0][axis])
        elif axis == 1 and all(length == size for length, size in sizes.items()):
            result.append("seq")
        else:
            return None
    return tuple(result)
