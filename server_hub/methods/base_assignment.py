"""Which base networks each device trains in a round, and on which examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.training.adversarial import Attack


@dataclass(frozen=True)
class BaseAssignment:
    """Which base networks devices train, and whether on adversarial examples.

    Attributes:
        bases: number of base networks.
        budgets: by tier, the part of the wide model that a device trains in a round; 1 for tiers
            that are not named.
        robustness: weight of adversarial examples in the loss; 0 for none.
        dual_norms: whether base networks have norms of their own for adversarial examples.
        attack: the attack that makes adversarial examples.
        masked: whether a device's loss leaves out classes that it has no examples of.
        seed: seed of the draws.
    """

    bases: int
    budgets: Mapping[str, float] = field(default_factory=dict)
    robustness: float = 0.0
    dual_norms: bool = True
    attack: Attack = field(default_factory=Attack)
    masked: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for tier, budget in self.budgets.items():
            if not 0 < budget <= 1:
                raise ConfigError(
                    f"tier {tier!r} has a budget of {budget:g}; all of the model is 1"
                )

    def count(self, tier: str) -> int:
        """Number of base networks that a device of a tier trains in a round.

        Raises:
            ConfigError: the tier's budget is below one base network.
        """
        budget = self.budgets.get(tier, 1.0)
        count = int(budget * self.bases + 1e-9)
        if count < 1:
            raise ConfigError(
                f"tier {tier!r} has a budget of {budget:g} of the model, and one of {self.bases} "
                f"bases takes {1 / self.bases:g}; raise its budget, or split into more bases"
            )
        return count

    def draw(self, number: int, tiers: Mapping[str, str]) -> dict[str, list[int]]:
        """Numbers of the base networks of each device in round ``number``.

        Args:
            number: number of the round, from 1 on.
            tiers: tier by device, of the round's members.
        """
        rng = np.random.default_rng([self.seed, number])
        drawn = {}
        for i, device in enumerate(sorted(tiers)):
            place = (number - 1) * len(tiers) + i
            queue = np.random.default_rng([self.seed, 0, place // self.bases])
            first = int(queue.permutation(self.bases)[place % self.bases])
            others = [b for b in range(self.bases) if b != first]
            more = rng.permutation(others)[: self.count(tiers[device]) - 1]
            drawn[device] = [first, *(int(b) for b in more)]
        return drawn

    def hyper(self, adversarial: bool) -> dict[str, float]:
        """Hyper-parameters of the loss, for a device.

        Args:
            adversarial: whether the device's bundle can make adversarial examples.
        """
        hyper = {"masked": float(self.masked)}
        if self.robustness and adversarial:
            hyper |= {"robustness": self.robustness, **self.attack.to_hyper()}
        return hyper
