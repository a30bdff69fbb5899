"""The newest rows of a source that grows."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Selection, Source


class Recent(Selection):
    """A source bounded by number or age. Older rows are not deleted; they are no longer seen.

    The bounds apply when a snapshot is made: in a round no row becomes too old.

    Args:
        source: the source. If it does not know when rows came, later rows are newer.
        rows: largest number of rows; None for any.
        age_s: largest age in seconds, by :meth:`Source.times`; None for any.
        now: returns the time in seconds since 1970.

    Raises:
        ConfigError: a bound is not above 0.
        DataError: ``age_s`` is given, and the source does not know when its rows came.
    """

    def __init__(
        self,
        source: Source,
        rows: int | None = None,
        age_s: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        for name, bound in (("rows", rows), ("age_s", age_s)):
            if bound is not None and not bound > 0:
                raise ConfigError(f"{name} is {bound}; it must be above 0")
        self._bounds = rows, age_s, now
        super().__init__(source, _recent(source, rows, age_s, now))

    def snapshot(self) -> Recent:
        """The newest rows of the source as it is now."""
        return type(self)(self._source.snapshot(), *self._bounds)


def _recent(
    source: Source, rows: int | None, age_s: float | None, now: Callable[[], float]
) -> Array:
    """Numbers of the rows within the bounds, in the source's order."""
    try:
        times = source.times()
    except DataError:
        if age_s is not None:
            raise
        times = np.zeros(len(source))
    fresh = np.flatnonzero(times >= now() - age_s) if age_s is not None else np.arange(len(times))
    if rows is None:
        return fresh
    newest = fresh[np.argsort(times[fresh], kind="stable")]
    return np.sort(newest[-rows:])
