"""Who trains which base networks in a round, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.training.adversarial import Attack


@dataclass(frozen=True)
class BaseAssignment:
    """Who trains which bases, and whether on examples made hard.

    Attributes:
        bases: how many there are.
        budgets: by tier, the part of the wide model that a device trains in a round; all of it
            for tiers that are not named.
        robustness: weight of examples made hard in the loss; 0 for none.
        dual_norms: whether bases get norms of their own for them.
        attack: how they are made.
        masked: whether a device's loss leaves out classes that it has no examples of.
        seed: of the draws.
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
        """Bases that a device of a tier trains in a round.

        Raises:
            ConfigError: its budget is below one base.
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
        """The bases of each device in round ``number``.

        Args:
            number: from 1 on.
            tiers: by device, of those that take part.
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

    def hyper(self, hardens: bool) -> dict[str, float]:
        """What devices need to know: those that make examples hard, and others."""
        hyper = {"masked": float(self.masked)}
        if self.robustness and hardens:
            hyper |= {"robustness": self.robustness, **self.attack.to_hyper()}
        return hyper
