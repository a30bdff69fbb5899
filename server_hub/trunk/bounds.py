"""Bounds of what one device may do in a step of the trunk.

A row of activations far longer than those of other devices is shortened. Each device has one vote
on what is usual, however many rows it sends. Everything stays on the trunk's device; the host does
not wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 4.0
"""Largest norm of a row, as a multiple of the median of the devices."""

HOPELESS = 1e6
"""A row that is so many times longer than allowed is no accident. It becomes infinite, so that the
step refuses its batch."""


class ActivationBound:
    """Shortens the rows of activations of a device that are far longer than those of others.

    The level of a device is the mean norm of its rows in its latest batch of the round, per element
    (root mean square). A row may have :data:`FACTOR` times the median level. Levels of the round
    before have one vote together, for the first steps of a round.

    Args:
        device: torch device of the trunk.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: dict[str, int] = {}
        self._levels: dict[tuple[int, int], Tensor] = {}
        self._pending: dict[tuple[int, int], Tensor] = {}

    def begin(self) -> None:
        """Start a round."""
        for entry, levels in self._levels.items():
            self._levels[entry] = levels.nanmedian()[None]
        self._places.clear()
        self._pending.clear()

    def shortened(
        self, entries: Sequence[tuple[str, int, int]], h: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the activations of the batches of one step, with long rows shortened.

        A row within the bound stays as it is, bit for bit. One that is not finite stays so.

        Args:
            entries: device, cut and base network of each batch.
            h: activations (rows, ...) of each batch.
        """
        self._pending.clear()
        for device, _, _ in entries:
            self._places.setdefault(device, len(self._places) + 1)
        bounded = list(h)
        for cut, base in dict.fromkeys(entry[1:] for entry in entries):
            mine = [i for i, entry in enumerate(entries) if entry[1:] == (cut, base)]
            places = [self._places[entries[i][0]] for i in mine]
            factors = self._factors((cut, base), places, [h[i] for i in mine])
            for i, factor in zip(mine, factors, strict=True):
                bounded[i] = h[i] * factor.view(-1, *(1 for _ in h[i].shape[1:]))
        return bounded

    def _factors(
        self, entry: tuple[int, int], places: Sequence[int], h: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the factors (rows,) of the rows of each batch at one entry."""
        rows = torch.tensor([len(batch) for batch in h])
        levels = self._grown(entry)
        norms_R = torch.cat([_rms(batch) for batch in h])
        place = torch.tensor(places)
        counts = self._moved(torch.zeros(len(levels)).index_add(0, place, rows.float()))
        where_R = self._moved(place.repeat_interleave(rows))
        means = torch.zeros_like(levels).index_add(0, where_R, norms_R) / counts
        known = torch.where(counts > 0, means, levels)
        limit = FACTOR * known.nanmedian()
        self._pending[entry] = known.clamp(max=limit)
        factors = torch.where(norms_R <= limit, 1.0, limit / norms_R)
        factors = torch.where(norms_R > HOPELESS * limit, torch.inf, factors)
        return torch.split(factors, rows.tolist())

    def _moved(self, tensor: Tensor) -> Tensor:
        """Move a small tensor to the trunk's device; the host does not wait."""
        return tensor.to(self._device, non_blocking=True)

    def keep(self) -> None:
        """Remember the levels of the latest batches, which a step has used."""
        self._levels.update(self._pending)
        self._pending.clear()

    def _grown(self, entry: tuple[int, int]) -> Tensor:
        """Return the levels at an entry, with a place for every device; NaN where unknown."""
        levels = self._levels.get(entry)
        if levels is None:
            levels = torch.full((1,), torch.nan, device=self._device)
        missing = len(self._places) + 1 - len(levels)
        return torch.cat([levels, levels.new_full((missing,), torch.nan)]) if missing else levels


def _rms(h: Tensor) -> Tensor:
    """Return the root mean square of the elements of each row (rows,)."""
    flat = h.detach().flatten(1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1).float()
    return norms / math.sqrt(flat.shape[1])
