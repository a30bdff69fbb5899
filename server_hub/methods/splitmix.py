"""Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747): narrow networks, mixed.

A wide model is split by width into K independent *base networks*. Each round::

    hub    : a device with a budget of b trains n = b K bases: the first from one shuffled queue,
             in which each base comes once before any comes again, the others at random
    device : E local epochs on each of its bases, and on examples that it has made hard
    hub    : each base becomes the mean of its copies, weighted by samples; others stay
    use    : the mean of the logits of any number of bases, the best first

A tier whose cut is the depth of the model trains its bases as a whole. Others train them up to
their cut, as in FedSplitX: auxiliary heads there, activations up, and the trunk trains the deep
part of all bases at once (:mod:`server_hub.trunk.vmapped`).
"""

from __future__ import annotations

from dataclasses import replace

from export.bases import split_width
from export.whole import whole_bases
from server_hub.aggregation.layer_store import (
    State,
)
from server_hub.aggregation.per_base import PerBase
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, SharedCopy, Stage, always


def splitmix(initial: State, outline: JobOutline) -> Method:
    """Split-Mix as a composition.

    Args:
        initial: the tensors that are trained, each (bases, ...).
        outline: has the :class:`BaseAssignment`.
    """
    assert outline.mixing is not None
    return Method(
        name="Split-Mix",
        stage=always(Stage("train" if outline.split else "none")),
        copies=SharedCopy(),
        aggregation=PerBase(initial),
        paths=("mix",),
        mixing=outline.mixing,
    )


def by_bases(fleet: Fleet) -> Fleet:
    """Every tier trains bases: whole ones, or up to its cut."""
    assert fleet.mixing is not None
    for name in fleet.tiers:
        fleet.mixing.count(name)
    bases = split_width(fleet.model, fleet.mixing.bases, fleet.example, seed=fleet.mixing.seed)
    if fleet.mixing.robustness and fleet.mixing.dual_norms:
        bases = bases.with_dual_norms()
    depth = fleet.model.depth
    cuts = {tier.cut for tier in fleet.tiers.values() if tier.cut < depth}
    found = whole_bases(bases, cuts, fleet.example, fleet.classes)
    tiers = {
        name: replace(
            tier,
            bases=fleet.mixing.bases,
            adversarial=bool(fleet.mixing.robustness) and tier.adversarial,
        )
        for name, tier in fleet.tiers.items()
    }
    models = {name: found.whole for name, tier in tiers.items() if tier.cut == depth}
    return replace(fleet, model=found.hub, tiers=tiers, models=models, bases=found.states)


SPLITMIX = Recipe("Split-Mix", splitmix, by_bases, takes_whole=True)
