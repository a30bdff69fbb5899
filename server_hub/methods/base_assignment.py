"""The assignment of base networks to devices in a round of Split-Mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.training.adversarial import Attack


@dataclass(frozen=True)
class BaseAssignment:
    """Assigns base networks to devices, and sets the loss that devices train them on.

    Attributes:
        bases: number of base networks.
        budgets: by tier, the fraction of the wide model that a device trains in a round, above 0
            and at most 1. A tier without an entry has the budget 1.
        robustness: weight of adversarial examples in the loss, from 0 (none) to 1.
        dual_norms: whether base networks have separate norms for adversarial examples.
        attack: the attack that makes adversarial examples.
        masked: whether a device's loss leaves out the classes that the device has no examples of.
        seed: seed of the random assignment.

    Raises:
        ConfigError: a budget is out of its range.
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
        """Return the number of base networks that a device of ``tier`` trains in a round.

        Raises:
            ConfigError: the tier's budget is smaller than one base network.
        """
        budget = self.budgets.get(tier, 1.0)
        count = int(budget * self.bases + 1e-9)
        if count < 1:
            raise ConfigError(
                f"tier {tier!r} has a budget of {budget:g} of the model, and one of {self.bases} "
                f"bases takes {1 / self.bases:g}; raise its budget, or split into more bases"
            )
        return count

    def draw(self, number: int, place: int, tiers: Mapping[str, str]) -> dict[str, list[int]]:
        """Draw the base networks of each device for round ``number``.

        The first base network of each device comes from one shuffled queue, in which every base
        network comes once before any comes again. The others are drawn at random.

        Args:
            number: number of the round, from 1 on.
            place: number of devices in all rounds before, which have taken from the queue.
            tiers: tier of each member of the round, by device name.

        Returns:
            Numbers of the base networks, by device name.
        """
        rng = np.random.default_rng([self.seed, number])
        drawn = {}
        for i, device in enumerate(sorted(tiers), start=place):
            queue = np.random.default_rng([self.seed, 0, i // self.bases])
            first = int(queue.permutation(self.bases)[i % self.bases])
            others = [b for b in range(self.bases) if b != first]
            more = rng.permutation(others)[: self.count(tiers[device]) - 1]
            drawn[device] = [first, *(int(b) for b in more)]
        return drawn

    def hyper(self, adversarial: bool) -> dict[str, float]:
        """Return the hyper-parameters of a device's loss, by name.

        Args:
            adversarial: whether the device's bundle has the graphs for adversarial examples.
        """
        hyper = {"masked": float(self.masked)}
        if self.robustness and adversarial:
            hyper |= {"robustness": self.robustness, **self.attack.to_hyper()}
        return hyper
