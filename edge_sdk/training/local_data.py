"""What a device trains on: the rows of a source without the share that is kept back."""

from __future__ import annotations

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Selection, Source


class LocalData:
    """A device's source, of which a share is kept back for evaluation and never trained on.

    A round trains on the rows that the source had when the device began the round. What it draws
    depends on these rows, the round's seed, and nothing else. Whether a row is kept back depends on
    its key alone: see :meth:`Source.keys`.

    Args:
        source: the rows.
        keep_back: expected share of the rows to keep back, from 0 to below 1.

    Raises:
        ConfigError: the share is out of range.
        DataError: the source is not a :class:`Source`.
    """

    def __init__(self, source: Source, keep_back: float = 0.0) -> None:
        if not 0 <= keep_back < 1:
            raise ConfigError(f"keep_back is {keep_back:g}; it must be from 0 to below 1")
        if not isinstance(source, Source):
            raise DataError(
                f"data is a {type(source).__name__}; it must be a Source, such as Examples(x, y)"
            )
        self._source, self._share = source, keep_back
        self._fitted = source
        self._round: tuple[int, int] | None = None
        self._rows: Source | None = None  # of that round
        self._joined: Source | None = None

    def fit(self, manifest: Manifest) -> None:
        """Give rows in the dtypes of a bundle's graphs from now on.

        Raises:
            DataError: there are no rows to train on, or the first ones do not fit the model.
        """
        fitted = self._source.fitted(manifest)
        rows = fitted.snapshot()
        if len(self._side(rows, kept=False)) == 0:
            raise DataError(f"all {len(rows)} rows are kept back; none is left to train on")
        self._fitted, self._round = fitted, None

    def join(self) -> int:
        """Look at the source; returns the number of rows to train on, which a hub is told."""
        self._joined = self._side(self._fitted.snapshot(), kept=False)
        return len(self._joined)

    def begin(self, number: int, seed: int, recount: bool = True) -> Source:
        """The rows to train on in a round, as the source is now.

        The same round begun again, in this process, has the rows that it had.

        Args:
            number: number of the round.
            seed: seed of the round.
            recount: whether the hub can be told another number of rows; otherwise the rows are
                those of the last :meth:`join`.
        """
        if not recount:
            assert self._joined is not None
            return self._joined
        if self._rows is None or self._round != (number, seed):
            self._rows = self._side(self._fitted.snapshot(), kept=False)
            self._round = number, seed
        return self._rows

    def kept_back(self) -> Source:
        """The rows that are kept back, as the source is now. There may be none."""
        return self._side(self._fitted.snapshot(), kept=True)

    def _side(self, rows: Source, kept: bool) -> Source:
        if self._share == 0 and not kept:
            return rows
        return Selection(rows, np.flatnonzero(is_kept_back(rows.keys(), self._share) == kept))


def is_kept_back(keys: Array, share: float) -> Array:
    """Whether rows belong to the share that is kept back, (rows,) bool.

    A row does if the hash of its key, as a fraction of the largest one, is below the share. The
    hash is that of SplitMix64, so neighbouring keys have nothing in common.

    Args:
        keys: keys of the rows, (rows,) int64.
        share: expected share, from 0 to 1.
    """
    mixed = keys.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    kept: Array = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
    return kept
