"""Finds what a model accepts: the largest token ids, the longest text, the number of classes.

Nothing is read from names or configurations. The sizes of a model's tensors are candidates for a
bound; a bound is one that the model accepts and whose successor it rejects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_sdk.bundle.ranges import MAX_POSITIONS
from export.cutting.split_model import NoHead, SplitModel, answer, evaluating
from export.errors import ExportError, reason
from export.torch_internals import ShapesOnly

_COLUMNS = 512
"""Largest number of columns of integers for each of which a bound is looked for."""


@dataclass(frozen=True)
class InputRanges:
    """What the inputs of a model may hold.

    Attributes:
        highest: largest values of integers, see :class:`edge_sdk.bundle.ranges.Ranges`.
        longest: largest number of positions of a text; None if the model sets no limit.
    """

    highest: tuple[int, ...] = ()
    longest: int | None = None


def find_ranges(model: SplitModel, example: Tensor) -> InputRanges:
    """Find the ranges of integer inputs; floats have none.

    Args:
        model: the model, on the CPU.
        example: inputs (batch, ...) that it accepts.
    """
    if example.is_floating_point():
        return InputRanges()
    with torch.no_grad(), evaluating(model):
        text = example.dim() == 2 and example.shape[1] > 1
        text = text and _accepts(model.stem, example[:2, :-1])
        highest = _highest(model.stem, example[:2], text)
        longest = _longest(model, example) if text else None
    return InputRanges(highest, longest)


def outputs(model: SplitModel, example: Tensor) -> int | None:
    """Number of logits of the model's head; None if the model has no head of its own.

    Raises:
        ExportError: the model fails on the example.
    """
    if isinstance(model.head, NoHead):
        return None
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(example[:1])
    except Exception as error:  # the model's own code raises anything
        raise ExportError(
            f"the model fails on inputs of shape {list(example.shape[1:])}: {reason(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ExportError("the model must return logits, (batch, classes)")
    return logits.shape[-1]


def check_classes(model: SplitModel, example: Tensor, classes: int) -> None:
    """Raise :class:`ExportError` unless the model's head gives ``classes`` logits.

    The auxiliary heads give as many, so that answers of device and hub can be joined. Data may
    have fewer classes.
    """
    found = outputs(model, example)
    if found is not None and found != classes:
        raise ExportError(
            f"classes is {classes}, and the model's head gives {found} logits; leave out classes, "
            "or change the head. Data may have fewer classes than the head"
        )


def _highest(stem: nn.Module, rows: Tensor, text: bool) -> tuple[int, ...]:
    """The largest values that the stem accepts: one, or one for each column."""
    sizes = _sizes(stem)
    if text or rows.dim() != 2 or rows.shape[1] > _COLUMNS:
        bound = _bound(lambda value: _accepts(stem, torch.full_like(rows, value)), sizes)
        return () if bound is None else (bound,)
    bounds = []
    for column in range(rows.shape[1]):

        def takes(value: int, column: int = column) -> bool:
            x = rows.clone()
            x[:, column] = value
            return _accepts(stem, x)

        bound = _bound(takes, sizes)
        bounds.append(torch.iinfo(rows.dtype).max if bound is None else bound)
    if min(bounds) == torch.iinfo(rows.dtype).max:
        return ()
    return tuple(bounds) if len(set(bounds)) > 1 else (bounds[0],)


def _bound(takes: Callable[[int], bool], sizes: list[int]) -> int | None:
    """The bound that belongs to one of the sizes; None if none does."""
    return next((size - 1 for size in sizes if takes(size - 1) and not takes(size)), None)


def _longest(model: SplitModel, example: Tensor) -> int | None:
    """The largest number of positions up to :data:`MAX_POSITIONS`; None if all are accepted.

    The stem runs, since a table of positions is read by index. The rest runs on shapes alone:
    blocks may take memory for the square of the length.
    """

    def text(length: int) -> Tensor:
        return example[:1].repeat(1, -(-length // example.shape[1]))[:, :length]

    shapes = ShapesOnly()

    def whole(x: Tensor) -> None:
        with shapes, _silent(ShapesOnly.LOGGER):
            h = model.stem(shapes.like(x))
            for depth, block in enumerate(model.block, start=1):
                h = block(h)
                if str(depth) in model.aux:
                    answer(model.aux[str(depth)], model.stem, h)
            model.head(h)

    length = example.shape[1]
    limit = _length(lambda n: _accepts(model.stem, text(n)), _sizes(model.stem), length)
    whole_sizes = [size for size in _sizes(model) if limit is None or size < limit]
    found = _length(lambda n: _accepts(whole, text(n)), whole_sizes, length)
    return limit if found is None else found


def _length(takes: Callable[[int], bool], sizes: list[int], length: int) -> int | None:
    """The largest length that is accepted, if one near a size is the last; else None.

    A table of positions may be longer than the longest text, as its first rows may have another
    purpose, so lengths below its size are tried as well.
    """
    if not takes(length):
        return None
    for size in sizes:
        if length <= size <= MAX_POSITIONS and not takes(size + 1):
            low, high = length, size + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if takes(middle) else (low, middle)
            return low
    return None


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Disable a logger: torch logs the errors that are expected here."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _sizes(module: nn.Module) -> list[int]:
    """The sizes of the dimensions of all tensors of a module, in ascending order."""
    tensors = [*module.parameters(), *module.buffers()]
    return sorted({size for tensor in tensors for size in tensor.shape})


def _accepts(run: Callable[[Tensor], object], x: Tensor) -> bool:
    try:
        run(x)
    except Exception:  # the model's own code raises anything
        return False
    return True
