"""Bounds of what one device may do in a step of the trunk.

A row of activations far longer than those of other devices is shortened, and so is a row of the
gradients that devices with labels send back. Each device has one vote on what is usual, however
many rows it sends. Everything stays on the trunk's device; the host does not wait. And no device
with many batches has most of a step.
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
        factors = self.factors(entries, h)
        return [_times(batch, factor) for batch, factor in zip(h, factors, strict=True)]

    def factors(self, entries: Sequence[tuple[str, int, int]], h: Sequence[Tensor]) -> list[Tensor]:
        """Return the factor of each row (rows,), by batch; see :meth:`shortened`."""
        self._pending.clear()
        for device, _, _ in entries:
            self._places.setdefault(device, len(self._places) + 1)
        found: dict[int, Tensor] = {}
        for cut, base in dict.fromkeys(entry[1:] for entry in entries):
            mine = [i for i, entry in enumerate(entries) if entry[1:] == (cut, base)]
            places = [self._places[entries[i][0]] for i in mine]
            factors = self._factors_at((cut, base), places, [h[i] for i in mine])
            found.update(zip(mine, factors, strict=True))
        return [found[i] for i in range(len(h))]

    def _factors_at(
        self, entry: tuple[int, int], places: Sequence[int], h: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the factors (rows,) of the rows of each batch at one entry."""
        rows = torch.tensor([len(batch) for batch in h])
        levels = self._grown(entry)
        norms_R = torch.cat([_rms(batch) for batch in h])
        place = torch.tensor(places)
        counts = self._moved(torch.zeros(len(levels)).index_add(0, place, rows.float()))
        where_R = self._moved(place.repeat_interleave(rows))
        known = torch.where(counts > 0, self._level(norms_R, where_R, counts, levels), levels)
        limit = FACTOR * known.nanmedian()
        self._pending[entry] = known.clamp(max=limit)
        return torch.split(self._within(norms_R, limit), rows.tolist())

    def _level(self, norms_R: Tensor, where_R: Tensor, counts: Tensor, before: Tensor) -> Tensor:
        """Return the new level of each place, given the places and norms of rows."""
        return torch.zeros_like(before).index_add(0, where_R, norms_R) / counts

    def _within(self, norms_R: Tensor, limit: Tensor) -> Tensor:
        """Return the factors (rows,) that bring rows of these norms to the limit."""
        factors = torch.where(norms_R <= limit, 1.0, limit / norms_R)
        return torch.where(norms_R > HOPELESS * limit, torch.inf, factors)

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


class GradientBound(ActivationBound):
    """Shortens the rows of gradients of features that are far longer than those of others.

    Most rows of a batch that a model is right about have small gradients. So the level of a device
    is the norm of its longest row in the round so far, which is about that of a row that the model
    is wrong about. A device whose gradients are all zero has no vote.
    """

    def shortened_gradients(
        self, devices: Sequence[str], gradients: Sequence[Tensor], labels: Sequence[int]
    ) -> list[Tensor]:
        """Return the gradients of the batches of one step, with long rows shortened.

        A row within the bound stays as it is, bit for bit.

        Args:
            devices: device of each batch.
            gradients: gradient (rows, ...) of the mean loss of each batch.
            labels: number of labels of each mean.
        """
        sums = [g * n for g, n in zip(gradients, labels, strict=True)]
        factors = self.factors([(device, 0, 0) for device in devices], sums)
        return [_times(g, factor) for g, factor in zip(gradients, factors, strict=True)]

    def _level(self, norms_R: Tensor, where_R: Tensor, counts: Tensor, before: Tensor) -> Tensor:
        longest = torch.zeros_like(before).scatter_reduce(0, where_R, norms_R, "amax")
        longest = torch.fmax(before, longest)
        return torch.where(longest > 0, longest, torch.nan)

    def _within(self, norms_R: Tensor, limit: Tensor) -> Tensor:
        # without any level all rows are zeros, or not finite
        return torch.where((norms_R <= limit) | limit.isnan(), 1.0, limit / norms_R)


def shares(devices: Sequence[str], weights: Sequence[float]) -> list[float]:
    """Factors of the weights of a step's batches, so that no device has most of the step.

    A device with several batches weighs at most as much as all others together, or as its heaviest
    batch alone. With fewer than three devices that weigh anything, nobody can say what is too much:
    all factors are 1.

    Args:
        devices: device of each batch.
        weights: weight of each batch as a whole.
    """
    of_device: dict[str, list[float]] = {}
    for device, weight in zip(devices, weights, strict=True):
        of_device.setdefault(device, []).append(weight)
    totals = {device: math.fsum(own) for device, own in of_device.items()}
    if sum(total > 0 for total in totals.values()) < 3:
        return [1.0] * len(devices)
    whole = math.fsum(weights)
    most = {d: max(whole - totals[d], *own, 0.0) for d, own in of_device.items()}
    factors = {d: most[d] / t if t > most[d] else 1.0 for d, t in totals.items()}
    return [factors[device] for device in devices]


def _times(h: Tensor, factor_R: Tensor) -> Tensor:
    """Return ``h`` with every row multiplied by its factor."""
    return h * factor_R.view(-1, *(1 for _ in h.shape[1:]))


def _rms(h: Tensor) -> Tensor:
    """Return the root mean square of the elements of each row (rows,)."""
    flat = h.detach().flatten(1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1).float()
    return norms / math.sqrt(flat.shape[1])
