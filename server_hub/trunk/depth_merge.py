"""One pass over the trunk for devices that enter at different depths.

It walks the blocks upward and, at each block, concatenates the activations that enter there with
what comes from below::

    h = None
    for d in range(shallowest cut, N):
        h = concat(h, unpack(arrivals[d]));  h = blocks[d](h);  losses of the heads at d + 1
    loss(head(h)); one backward; one optimizer step

The batch grows with depth, and a row's weight is its device's own: the gradient is the sum of what
each arrival gives alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from export.dual_norm import robustness
from export.losses import NO_LABEL, masked
from export.split import NoHead, SplitModel


class Entering(NamedTuple):
    """An arrival that enters the trunk.

    Attributes:
        h: activations (rows, ...).
        labels: (rows,) or, for tokens, (rows, positions).
        weights: of each row (rows,).
        present: (rows, classes), 1 for classes that the loss of a row is over; all if None.
        noise: (rows,), 1 for rows that go through the noise norms; none if None.
    """

    h: Tensor
    labels: Tensor
    weights: Tensor
    present: Tensor | None = None
    noise: Tensor | None = None


def depth_merged_loss(
    model: SplitModel,
    entering: Mapping[int, Sequence[Entering]],
    *,
    auxiliary: bool = True,
) -> tuple[Tensor, Tensor]:
    """One pass over arrivals that enter at different depths.

    Texts are padded at the right, with zeros and labels that do not count, to the longest that is
    there; in a causal model no position sees what is behind it.

    Args:
        model: blocks, auxiliary heads and head.
        entering: the arrivals by cut; all have ``present`` or none, and likewise ``noise``.
        auxiliary: whether the auxiliary heads have a part in the loss.

    Returns:
        The loss: sum over rows of weight times summed cross-entropy of the heads above the cut;
        and the unweighted loss of each row, in the order of cut, then arrival. That of a text is
        the sum over its labels that count.
    """
    rows: Entering | None = None
    row_losses = torch.empty(0)
    for depth in range(min(entering), model.depth):
        if new := entering.get(depth):
            fresh = _joined(new)
            zeros = torch.zeros_like(fresh.weights)
            row_losses = zeros if rows is None else torch.cat([row_losses, zeros])
            rows = fresh if rows is None else _joined([rows, fresh])
        assert rows is not None
        with _noisy(rows):
            h = model.block[depth](rows.h)
            rows = rows._replace(h=h)
            if auxiliary and str(depth + 1) in model.aux:
                logits = masked(model.answer(depth + 1, h), rows.present)
                row_losses = row_losses + _row_losses(logits, rows.labels)
    assert rows is not None
    if not isinstance(model.head, NoHead):
        with _noisy(rows):
            row_losses = row_losses + _row_losses(model.head(rows.h), rows.labels)
    return (row_losses * rows.weights).sum(), row_losses.detach()


def merged_features(model: SplitModel, entering: Mapping[int, Sequence[Tensor]]) -> Tensor:
    """What leaves the last block, for arrivals that enter at different depths.

    Args:
        model: its blocks.
        entering: by cut, the activations (rows, ...) of each arrival.

    Returns:
        (rows, ...) in the order of cut, then arrival; texts padded as in the loss.
    """
    h: Tensor | None = None
    for depth in range(min(entering), model.depth):
        if new := entering.get(depth):
            h = _merged([*([] if h is None else [h]), *new], 0)
        assert h is not None
        h = model.block[depth](h)
    assert h is not None
    return h


def _noisy(rows: Entering) -> AbstractContextManager[None]:
    """In which noise norms, those of heads too, are for the rows that are noise."""
    return nullcontext() if rows.noise is None else robustness(rows.noise)


def _joined(arrivals: Sequence[Entering]) -> Entering:
    """The rows of all."""
    present = [a.present for a in arrivals if a.present is not None]
    noise = [a.noise for a in arrivals if a.noise is not None]
    return Entering(
        _merged([a.h for a in arrivals], 0),
        _merged([a.labels for a in arrivals], NO_LABEL),
        torch.cat([a.weights for a in arrivals]),
        torch.cat(present) if present else None,
        torch.cat(noise) if noise else None,
    )


def _merged(arrivals: Sequence[Tensor], filler: int) -> Tensor:
    """The rows of all, texts (rows, positions, ...) filled up at the right to the longest."""
    if arrivals[0].dim() == 1:
        return torch.cat(list(arrivals))
    longest = max(a.shape[1] for a in arrivals)
    return torch.cat(
        [
            a if a.shape[1] == longest
            else torch.cat([a, a.new_full((len(a), longest - a.shape[1], *a.shape[2:]), filler)], 1)
            for a in arrivals
        ]
    )  # fmt: skip


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row; of a text, the sum over its labels that count."""
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none")
    losses_N = cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none"
    )
    return losses_N.view(labels.shape).sum(1)
