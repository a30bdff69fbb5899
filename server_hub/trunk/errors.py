"""Errors of the trunk, and the division of work that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from edge_sdk.errors import CutlayerError

_REASON = 300
"""Largest number of characters of an exception that a reason repeats."""


class TrunkFailed(CutlayerError):
    """The trunk cannot go on, and with it the job."""


class WorkerDied(TrunkFailed):
    """The trunk's process has ended in the middle of a command."""


class TrunkRefused(CutlayerError):
    """The trunk cannot use one input; it goes on with the others."""


class TrunkDamaged(Exception):
    """An exception has left the trunk in a state that nothing but a new process mends."""


T = TypeVar("T")


def divided(
    work: Callable[[Sequence[T]], None], items: Sequence[T], refuse: Callable[[T, str], None]
) -> None:
    """Do some work on all items together; if that raises, on either half, down to single items.

    Work that is too large for the memory is divided until it fits. An item that makes the work
    fail is found by bisection.

    Args:
        work: the work; it changes nothing if it raises.
        items: what to work on.
        refuse: called with an item that the work fails on alone, and the reason.

    Raises:
        TrunkDamaged: the work raised it, or has left the accelerator unusable.
    """
    try:
        work(items)
        return
    except Exception as error:
        if is_damage(error):
            raise
        reason = reason_of(error)  # the exception itself holds the memory of the attempt
    if len(items) == 1:
        refuse(items[0], reason)
        return
    middle = len(items) // 2
    divided(work, items[:middle], refuse)
    divided(work, items[middle:], refuse)


def is_damage(error: BaseException) -> bool:
    """Whether nothing but a new process helps after ``error``."""
    return isinstance(error, TrunkDamaged | torch.AcceleratorError)


def reason_of(error: Exception) -> str:
    """Say in one line why an input cannot be used."""
    text = " ".join(str(error).split())
    lack = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if lack or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return "the batch does not fit into the memory of the trunk"
    return f"the trunk cannot use the batch: {type(error).__name__}: {text}"[:_REASON]
