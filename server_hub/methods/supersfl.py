"""SuperSFL (https://arxiv.org/abs/2601.02092): a device learns from its heads and from the hub.

A gradient comes back for every batch, as in SplitFed; the device joins it with that of its own
heads, by weights that follow both losses and the part of the blocks that it holds. While the hub
is away it goes on with its heads alone. Every tier has its own cut, and there is one trunk for all.
What the paper adds beside, a super-network of widths and its weights in the average, is not here.
"""

from __future__ import annotations

from dataclasses import replace

from server_hub.aggregation.layer_store import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, SharedCopy, Stage, always


def supersfl(initial: State, outline: JobOutline) -> Method:
    """Merged trunk, gradients of both sides fused on the device."""
    return Method(
        name="SuperSFL",
        stage=always(Stage("fused")),
        copies=SharedCopy(),
        aggregation=Merged(initial),
    )


def fusing(fleet: Fleet) -> Fleet:
    """Step graphs that take both gradients."""
    return replace(fleet, tiers={n: replace(t, fused=True) for n, t in fleet.tiers.items()})


SUPERSFL = Recipe("SuperSFL", supersfl, fusing)
