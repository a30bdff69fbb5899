"""Robust rules: averages of copies of a layer that a few hostile copies cannot move far.

They hold while fewer than a fifth of the copies are hostile. Every copy counts the same, because a
weight is what a device says about itself; a copy of the trunk is one copy. They cost accuracy when
devices hold different classes: an honest device that is unlike the others is left out, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from edge_sdk.protocol.tensors import Array, State
from server_hub.aggregation.layer_store import LayerCopy, Rule, weighted_mean

log = logging.getLogger("cutlayer.hub")

RuleName = Literal["mean", "trimmed_mean", "median", "krum"]
"""Name of a rule that averages the copies of a layer."""

FEWEST = 5
"""Number of copies from which on a robust rule can tell one hostile copy from the others."""


def trimmed_mean(old: Mapping[str, Array], copies: Sequence[LayerCopy]) -> State:
    """Return the mean of each element without its largest and smallest fifth (arXiv 1803.01498)."""
    cut = _hostile(copies)

    def kept(stacked: Array) -> Array:
        found: Array = np.sort(stacked, 0)[cut : len(stacked) - cut].mean(0)
        return found

    return _elementwise(kept, old, copies)


def median(old: Mapping[str, Array], copies: Sequence[LayerCopy]) -> State:
    """Return the median of each element (arXiv 1803.01498)."""
    return _elementwise(lambda stacked: np.median(stacked, 0), old, copies)


def krum(old: Mapping[str, Array], copies: Sequence[LayerCopy]) -> State:
    """Return the copy that is closest to its nearest neighbours (Krum, arXiv 1703.02757)."""
    flat = [
        np.concatenate([np.ravel(c.tensors[n]).astype(np.float64) for n in old]) for c in copies
    ]
    squares = np.array([[np.square(a - b).sum() for b in flat] for a in flat])
    neighbours = len(copies) - _hostile(copies) - 2
    scores = np.sort(squares, 1)[:, 1 : 1 + neighbours].sum(1)  # the first is the copy itself
    best = copies[int(scores.argmin())]
    return {n: np.array(best.tensors[n], t.dtype) for n, t in old.items()}


def rule_of(name: RuleName) -> Rule:
    """Return the rule with this name.

    A robust rule takes the weighted mean, and logs a warning, for a layer with fewer than
    :data:`FEWEST` copies.
    """
    rules: dict[RuleName, Rule] = {"trimmed_mean": trimmed_mean, "median": median, "krum": krum}
    if name == "mean":
        return weighted_mean
    rule = rules[name]

    def robust(old: Mapping[str, Array], copies: Sequence[LayerCopy]) -> State:
        if len(copies) >= FEWEST:
            return rule(old, copies)
        log.warning(
            "%s has %d copies in this round; the rule %s needs %d, so the weighted mean is taken",
            copies[0].layer, len(copies), name, FEWEST,
        )  # fmt: skip
        return weighted_mean(old, copies)

    return robust


def _hostile(copies: Sequence[LayerCopy]) -> int:
    """Return the number of copies that may be hostile: a fifth."""
    return len(copies) // 5


def _elementwise(
    reduce: Callable[[Array], Array], old: Mapping[str, Array], copies: Sequence[LayerCopy]
) -> State:
    """Return the tensors of a layer, each reduced over the copies (copies, ...) in float64."""
    return {
        n: reduce(np.stack([c.tensors[n].astype(np.float64) for c in copies])).astype(t.dtype)
        for n, t in old.items()
    }
