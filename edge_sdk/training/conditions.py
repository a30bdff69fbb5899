"""Whether a device may train now."""

from __future__ import annotations

from collections.abc import Callable

MayTrain = Callable[[int], str | None]
"""Asked before each round with its number. Returns None to train, or the reason to decline."""
