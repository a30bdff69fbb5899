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

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from export.losses import NO_LABEL
from export.split import SplitModel


def depth_merged_loss(
    model: SplitModel,
    entering: Mapping[int, Sequence[tuple[Tensor, Tensor, Tensor]]],
    *,
    auxiliary: bool = True,
) -> tuple[Tensor, Tensor]:
    """One pass over arrivals that enter at different depths.

    Texts are padded at the right, with zeros and labels that do not count, to the longest that is
    there; in a causal model no position sees what is behind it.

    Args:
        model: blocks, auxiliary heads and head.
        entering: by cut, ``(h, labels, weights)`` of each arrival: activations (rows, ...),
            labels (rows,) or, for tokens, (rows, positions), and weight of each row (rows,).
        auxiliary: whether the auxiliary heads have a part in the loss.

    Returns:
        The loss: sum over rows of weight times summed cross-entropy of the heads above the cut;
        and the unweighted loss of each row, in the order of cut, then arrival. That of a text is
        the sum over its labels that count.
    """
    h: Tensor | None = None
    labels = weights = row_losses = torch.empty(0)
    for depth in range(min(entering), model.depth):
        if new := entering.get(depth):
            fresh = [
                _merged([arrival[i] for arrival in new], filler)
                for i, filler in enumerate((0, NO_LABEL, 0))
            ]
            zeros = torch.zeros_like(fresh[2])
            if h is None:
                h, labels, weights, row_losses = fresh[0], fresh[1], fresh[2], zeros
            else:
                h = _merged([h, fresh[0]], 0)
                labels = _merged([labels, fresh[1]], NO_LABEL)
                weights = torch.cat([weights, fresh[2]])
                row_losses = torch.cat([row_losses, zeros])
        h = model.block[depth](h)
        if auxiliary and str(depth + 1) in model.aux:
            logits = model.answer(depth + 1, h)
            row_losses = row_losses + _row_losses(logits, labels)
    row_losses = row_losses + _row_losses(model.head(h), labels)
    return (row_losses * weights).sum(), row_losses.detach()


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
