"""HeteroFL (Diao et al., ICLR 2021, https://arxiv.org/abs/2010.01264) with slimmable training.

The models of the tiers are nested. A device holds the leading channels of every layer; its budget
is the fraction that it holds. In each step it trains a width that is drawn from the widths up to
its own. The paper of Split-Mix (https://arxiv.org/abs/2203.09747) compares with this variant. Each
element of a tensor is averaged over the devices that hold it. The method
:mod:`server_hub.methods.baselines.fjord` differs in the choice of the widths.
"""

from __future__ import annotations

from server_hub.methods.baselines.fjord import fjord, nested
from server_hub.methods.fleet import Fleet, Recipe


def by_budget(fleet: Fleet) -> Fleet:
    """Return the fleet with the whole depth on every tier, as wide as the tier's budget."""
    assert fleet.assignment is not None
    own = {name: fleet.assignment.budgets[name] for name in fleet.tiers}
    return nested(fleet, own, sorted(set(own.values())))


HETEROFL = Recipe("HeteroFL", fjord, by_budget, takes_whole=True)
