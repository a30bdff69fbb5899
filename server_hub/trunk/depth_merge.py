"""The depth-merged step: one pass over the trunk for activations that enter at different depths.

The pass goes through the blocks upward. At each block it concatenates the activations that enter
there with the output of the block below::

    h = None
    for d in range(shallowest cut, N):
        h = concat(h, unpack(arrivals[d]));  h = blocks[d](h);  losses of the heads at d + 1
    loss(head(h)); one backward; one optimizer step

The batch grows with depth. Each row has the weight of its device, so the gradient is the sum of the
gradients of the single arrivals.
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
        weights: weight of each row (rows,).
        present: class mask of each row (rows, classes): 1 for the classes in the loss, 0 for the
            others; None for all classes.
        noise: (rows,), 1 for rows that go through the noise norms, 0 for the others; None for no
            such rows.
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
    """Compute the loss of arrivals that enter at different depths, in one pass.

    Texts are padded on the right to the longest text at the same depth, with zeros and with labels
    that do not count. In a causal model no position depends on later positions.

    Args:
        model: blocks, auxiliary heads and head.
        entering: the arrivals by cut layer. Either all arrivals have ``present`` or none, and
            either all have ``noise`` or none.
        auxiliary: whether the loss includes the auxiliary heads.

    Returns:
        The loss, a scalar: the sum over rows of the row's weight times the summed cross-entropy of
        all heads above its cut. And the unweighted loss of each row (rows,), in the order of cut,
        then arrival; the loss of a text is the sum over its labels that count.
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
    """Compute the features of arrivals that enter at different depths, in one pass.

    Args:
        model: the model, whose blocks are used.
        entering: activations (rows, ...) of each arrival, by cut layer.

    Returns:
        Features (rows, ...), the output of the last block, in the order of cut, then arrival. Texts
        are padded as in :func:`depth_merged_loss`.
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
    """Return a context in which the noise norms apply to the rows with ``noise`` 1."""
    return nullcontext() if rows.noise is None else robustness(rows.noise)


def _joined(arrivals: Sequence[Entering]) -> Entering:
    """Concatenate the rows of arrivals."""
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
    """Concatenate rows; texts (rows, positions, ...) are padded on the right with ``filler``."""
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
    """Return the cross-entropy of each row (rows,); for a text the sum over labels that count."""
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none")
    losses_N = cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none"
    )
    return losses_N.view(labels.shape).sum(1)
