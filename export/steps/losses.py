"""Losses of a device, written so that their lowered gradients are exact and fast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

SCORES = "scores"
"""Name for verification of the scores of the classes, whose largest is the answer of the heads."""

NO_LABEL = -1
"""Label of a position that the loss leaves out, such as padding."""


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row of logits (rows, classes), with few passes over the logits.

    The ONNX export of ``nll_loss`` has gradients that are wrong by a factor of the batch size.
    One-hot times log-softmax is exact, but with a vocabulary as classes its backward pass takes
    longer than a transformer block.
    """

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, y_N: Tensor) -> Tensor:
        log_p_NC = torch.log_softmax(logits_NC, 1)
        ctx.save_for_backward(log_p_NC, y_N)
        return -log_p_NC.gather(1, y_N.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        log_p_NC, y_N = ctx.saved_tensors
        grad_N1 = grad_N.unsqueeze(1)
        return (log_p_NC.exp() * grad_N1).scatter_add(1, y_N.unsqueeze(1), -grad_N1), None


def _cross_entropy(logits_NC: Tensor, y_N: Tensor) -> Tensor:
    result: Tensor = _CrossEntropy.apply(logits_NC, y_N)  # type: ignore[no-untyped-call]
    return result


def disagreement(logits_HNC: Tensor) -> Tensor:
    """``sum_j sum_k KL(p_j || p_k)`` over the heads, for each row; ``p_j`` is detached.

    The terms with ``j = k`` and their gradients are zero, so the sum runs over all pairs at once.
    """
    log_p_HNC = torch.log_softmax(logits_HNC, 2)
    others_HNC = log_p_HNC.detach()
    excess_HNC = len(logits_HNC) * others_HNC - log_p_HNC.sum(0)
    return (others_HNC.exp() * excess_HNC).sum((0, 2))


def masked(logits: Tensor, present: Tensor | None = None) -> Tensor:
    """Logits whose masked classes have probability zero and gradient zero.

    Args:
        logits: (..., classes).
        present: class mask (classes,): 1 for classes to keep, 0 for others; None keeps all.
    """
    return logits if present is None else logits + (present - 1) * _NEVER


_NEVER = 1e9
"""Subtracted from the logit of a masked class, whose probability becomes exactly zero."""


def local_loss(logits: Tensor, y: Tensor, distill: float = 0.0) -> Tensor:
    """The loss of a device in FedSplitX: the sum over its heads of their mean cross-entropy.

    With ``distill`` the heads also learn from each other, as in DepthFL (Kim et al., ICLR 2023).
    The loss then has a further term for each head: ``distill`` times the mean over the other heads
    of ``KL(softmax(other) || softmax(own))``, where ``other`` is detached.

    Args:
        logits: (heads, batch, classes), or (heads, batch, positions, vocabulary).
        y: labels (batch,) or (batch, positions); in a text, positions with the label
            :data:`NO_LABEL` do not count.
        distill: weight of the distillation between heads.
    """
    heads, rows_N = len(logits), y.reshape(-1)
    counted_N = None
    if y.dim() == 2:
        counted_N = (rows_N >= 0).to(logits.dtype)
        rows_N = rows_N.clamp(min=0)
    all_rows = rows_N if heads == 1 else rows_N.repeat(heads)
    losses_N = _cross_entropy(logits.reshape(-1, logits.shape[-1]), all_rows)
    losses_N = losses_N.reshape(heads, -1).sum(0)
    if distill > 0 and heads > 1:
        apart_N = disagreement(logits.reshape(heads, -1, logits.shape[-1]))
        losses_N = losses_N + distill / (heads - 1) * apart_N
    if counted_N is None:
        return losses_N.mean()
    return (losses_N * counted_N).sum() / counted_N.sum().clamp(min=1)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Number of labels that the mean of the heads' softmax predicts; see :func:`local_loss`."""
    scores = torch.softmax(logits, -1).mean(0) if len(logits) > 1 else logits[0]
    answers_N = largest(scores.reshape(-1, scores.shape[-1]))
    return (answers_N == y.reshape(-1)).to(torch.float32).sum()


def largest(scores_NC: Tensor) -> Tensor:
    """Index of the largest score of each row, the first of equal ones.

    ONNX Runtime finds the largest score ten times as fast as its index. So the index is that of the
    first block with the largest score, and of the score in this block.
    """
    classes = scores_NC.shape[1]
    blocks = next(n for n in range(math.isqrt(classes), 0, -1) if classes % n == 0)
    if blocks < _BLOCKS:
        return scores_NC.argmax(1)
    scores_NBW = scores_NC.reshape(-1, blocks, classes // blocks)
    block_N = scores_NBW.amax(2).argmax(1)
    chosen_N1W = block_N.reshape(-1, 1, 1).expand(-1, 1, classes // blocks)
    return block_N * (classes // blocks) + scores_NBW.gather(1, chosen_N1W).squeeze(1).argmax(1)


_BLOCKS = 8
"""Smallest number of blocks that is worth the further operators."""


def reference_loss(
    logits: Tensor, y: Tensor, distill: float = 0.0, present: Tensor | None = None
) -> Tensor:
    """:func:`local_loss` of :func:`masked` logits with torch's losses, summed term by term."""
    y = y.reshape(-1)
    heads = [z.reshape(-1, z.shape[-1]) for z in logits]
    if present is not None:
        classes = present.nonzero().flatten()
        heads, y = [z[:, classes] for z in heads], torch.searchsorted(classes, y)
    losses = [cross_entropy(z, y, ignore_index=NO_LABEL) for z in heads]
    for own in heads if distill > 0 else ():
        for other in heads:
            if other is not own:
                target = log_softmax(other[y != NO_LABEL], 1).detach()
                answer = log_softmax(own[y != NO_LABEL], 1)
                apart = kl_div(answer, target, reduction="batchmean", log_target=True)
                losses.append(distill / (len(heads) - 1) * apart)
    return torch.stack(losses).sum()


def reference_correct(
    logits: Tensor, y: Tensor, present: Tensor | None = None
) -> dict[str, Tensor]:
    """The output ``correct``, see :func:`correct`, of :func:`masked` logits.

    With several heads also :data:`SCORES`, by which they choose their answer.
    """
    logits = logits.detach()
    if present is not None:
        logits = logits.masked_fill(present == 0, -torch.inf)
    scores = logits.softmax(-1).mean(0)
    found = {"correct": (scores.argmax(-1) == y).double().sum()}
    return found if len(logits) == 1 else {**found, SCORES: scores}
