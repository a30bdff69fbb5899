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
from torch.nn.functional import cross_entropy, pad

from export.bases.dual_norms import robustness
from export.cutting.split_model import NoHead, SplitModel
from export.steps.losses import NO_LABEL, masked


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
    arrivals = [arrival for cut in sorted(entering) for arrival in entering[cut]]
    labels = _merged([a.labels for a in arrivals], NO_LABEL)
    weights = torch.cat([a.weights for a in arrivals])
    present = _joined([a.present for a in arrivals])
    noise = _joined([a.noise for a in arrivals])
    h: Tensor | None = None
    row_losses = torch.zeros_like(weights[:0])
    for depth in range(min(entering), model.depth):
        if new := entering.get(depth):
            h = _merged([*([] if h is None else [h]), *(a.h for a in new)], 0)
        assert h is not None
        # rows come in the order of their cuts: those that are here are the first ones
        rows = slice(len(h))
        with _noisy(noise, rows):
            h = model.block[depth](h)
            if auxiliary and str(depth + 1) in model.aux:
                logits = masked(model.answer(depth + 1, h), _some(present, rows))
                row_losses = _padded(row_losses, h) + _row_losses(logits, labels[rows])
    assert h is not None
    row_losses = _padded(row_losses, h)
    if not isinstance(model.head, NoHead):
        with _noisy(noise, slice(None)):
            row_losses = row_losses + _row_losses(model.head(h), labels)
    return (row_losses * weights).sum(), row_losses.detach()


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


def _noisy(noise: Tensor | None, rows: slice) -> AbstractContextManager[None]:
    """Return a context in which the noise norms apply to those of ``rows`` with ``noise`` 1."""
    return nullcontext() if noise is None else robustness(noise[rows])


def _some(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Return some rows of a tensor that may be missing."""
    return None if tensor is None else tensor[rows]


def _joined(fields: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate the rows of a field that either all arrivals have or none."""
    given = [field for field in fields if field is not None]
    return torch.cat(given) if given else None


def _padded(row_losses: Tensor, h: Tensor) -> Tensor:
    """Append zeros for the rows of ``h`` that have no loss yet."""
    fresh = len(h) - len(row_losses)
    return pad(row_losses, (0, fresh)) if fresh else row_losses


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
    """Return the cross-entropy of each row (rows,); for a text the sum over labels that count.

    Texts that enter deeper may be longer: their labels may have more positions than the logits.
    """
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none")
    labels = labels[:, : logits.shape[1]]
    losses_N = cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none"
    )
    return losses_N.view(labels.shape).sum(1)
