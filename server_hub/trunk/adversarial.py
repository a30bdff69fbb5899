"""Adversarial examples for mixtures of base networks, which measure the robustness of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.training.adversarial import Attack
from export.bases.dual_norms import robustness
from export.cutting.split_model import SplitModel
from server_hub.trunk.evaluator import whole_answer


def mixed_logits(bases: Sequence[SplitModel], x: Tensor, robust: float) -> Tensor:
    """Return the mean of the logits of base networks (rows, classes).

    Args:
        bases: the base networks.
        x: inputs (rows, ...).
        robust: weight of the noise norms, from 0 to 1.
    """
    with robustness(robust):
        return torch.stack([whole_answer(base, x) for base in bases]).mean(0)


def hard_examples(
    bases: Sequence[SplitModel], x: Tensor, y: Tensor, attack: Attack, robust: float, seed: int = 0
) -> Tensor:
    """Make adversarial examples for the mixture of ``bases``.

    The attack is projected gradient ascent (https://arxiv.org/abs/1706.06083) on the loss of the
    mixture itself (white box).

    Args:
        bases: the base networks, in evaluation mode.
        x: inputs (rows, ...).
        y: labels (rows,).
        attack: the attack, in units of the inputs.
        robust: weight of the noise norms in the mixture, from 0 to 1.
        seed: seed of the random starting points.

    Returns:
        Adversarial examples, with the shape of ``x``.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (
        (x - attack.epsilon).clamp(min=attack.low),
        (x + attack.epsilon).clamp(max=attack.high),
    )
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
    x_adv = (x + attack.epsilon * noise).clamp(low, high)
    for _ in range(attack.steps):
        x_adv.requires_grad_()
        loss = cross_entropy(mixed_logits(bases, x_adv, robust), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [x_adv])
        x_adv = (x_adv.detach() + attack.step_size * gradient.sign()).clamp(low, high)
    return x_adv
