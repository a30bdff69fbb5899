"""A plan: the costs of all cuts, and the cut of every tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.bundles.tier_table import TiersConfig
from export.planning.cost import Cost, Failure, epoch_s


@dataclass(frozen=True)
class Choice:
    """The cut of a tier.

    Attributes:
        cut: the cut; None if the tier can carry none.
        given: whether ``tiers.toml`` sets the cut.
        fits: whether the cut is within the tier's limits.
        reason: why the cut is not deeper, or which limit it exceeds.
        cost: cost of the cut with the heads at the shallower cuts of all tiers.
    """

    cut: int | None
    given: bool
    fits: bool
    reason: str
    cost: Cost | Failure | None


@dataclass(frozen=True)
class Plan:
    """Costs of all cuts, each with the head at the cut only, and the cuts of the tiers.

    Attributes:
        costs: costs by cut, then by the settings that tiers use.
        settings: the tiers, with the settings that they share.
        choices: cut of each tier by name.
    """

    costs: tuple[Cost | Failure, ...]
    settings: TiersConfig
    choices: Mapping[str, Choice]

    def epochs(self, cost: Cost | Failure) -> dict[str, float | None]:
        """Seconds of a local epoch by tier, for the tiers whose settings were measured."""
        if isinstance(cost, Failure):
            return {}
        return {
            name: epoch_s(table, cost.counts)
            for name, table in self.settings.tiers.items()
            if self.settings.at(name, cost.tier.cut) == cost.tier
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as ``cutlayer plan --json`` prints it."""
        tiers = {}
        for name, choice in self.choices.items():
            cost = choice.cost
            table = self.settings.tiers[name]
            seconds = epoch_s(table, cost.counts) if isinstance(cost, Cost) else None
            tiers[name] = {
                "cut": choice.cut,
                "given": choice.given,
                "fits": choice.fits,
                "reason": choice.reason,
                "epoch_s": seconds,
                "cost": None if cost is None else cost.to_json(),
            }
        cuts = [{**cost.to_json(), "epoch_s": self.epochs(cost)} for cost in self.costs]
        return {"cuts": cuts, "tiers": tiers}
