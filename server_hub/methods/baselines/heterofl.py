"""HeteroFL (Diao et al., ICLR 2021, https://arxiv.org/abs/2010.01264) with slimmable training.

Nested models of several widths: a device holds the leading part of every layer's channels, as wide
as its budget, and in each step trains a width that is drawn from those up to its own, as Split-Mix
(https://arxiv.org/abs/2203.09747) has it for comparison. An element of a tensor is averaged over
the devices that hold it. :mod:`server_hub.methods.baselines.fjord` is the same with widths by what
tiers can compute.
"""

from __future__ import annotations

from server_hub.methods.baselines.fjord import fjord, nested
from server_hub.methods.fleet import Fleet, Recipe


def by_budget(fleet: Fleet) -> Fleet:
    """Every tier holds the whole depth, as wide as its budget."""
    assert fleet.assignment is not None
    own = {name: fleet.assignment.budgets[name] for name in fleet.tiers}
    return nested(fleet, own, sorted(set(own.values())))


HETEROFL = Recipe("HeteroFL", fjord, by_budget, takes_whole=True)
