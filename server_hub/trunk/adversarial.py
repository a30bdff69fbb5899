"""Examples made hard for mixtures of base networks, to measure how robust these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.training.adversarial import Attack
from export.dual_norm import robustness
from export.split import SplitModel
from server_hub.trunk.evaluator import whole_answer


def mixed_logits(bases: Sequence[SplitModel], x: Tensor, robust: float) -> Tensor:
    """Mean of the logits of some bases (rows, classes), as robust as is asked for."""
    with robustness(robust):
        return torch.stack([whole_answer(base, x) for base in bases]).mean(0)


def hard_examples(
    bases: Sequence[SplitModel], x: Tensor, y: Tensor, attack: Attack, robust: float, seed: int = 0
) -> Tensor:
    """Inputs near ``x`` that the very mixture gets wrong, if there are any to be found.

    Projected gradient ascent (https://arxiv.org/abs/1706.06083) by one who knows the bases and how
    they are mixed.

    Args:
        bases: the networks, in evaluation mode.
        x: inputs (rows, ...).
        y: labels (rows,).
        attack: how far, and in how many steps.
        robust: weight of the noise norms in the mixture, 0 to 1.
        seed: of the starting points.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (
        (x - attack.epsilon).clamp(min=attack.low),
        (x + attack.epsilon).clamp(max=attack.high),
    )
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
    hard = (x + attack.epsilon * noise).clamp(low, high)
    for _ in range(attack.steps):
        hard.requires_grad_()
        loss = cross_entropy(mixed_logits(bases, hard, robust), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [hard])
        hard = (hard.detach() + attack.step_size * gradient.sign()).clamp(low, high)
    return hard
