"""DepthFL (Kim et al., ICLR 2023): models of several depths, classifiers at every depth.

A device trains the blocks that it can carry, and a classifier at the depth of each tier up to its
own. Its classifiers also learn from each other, by self-distillation in the step graph. Each layer
is averaged over the devices that hold it. The hub trains no blocks, so the largest model is that of
the deepest tier.
"""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.protocol.tensors import State
from server_hub.methods.baselines.fedavg import fedavg
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method

DISTILLATION = 1.0
"""Weight in the loss of the divergence between the classifiers."""


def depthfl(initial: State, outline: JobOutline) -> Method:
    """Compose DepthFL, which is federated averaging on the hub.

    The arguments are those of :attr:`Recipe.compose`.
    """
    return replace(fedavg(initial, outline), name="DepthFL")


def distilling(fleet: Fleet) -> Fleet:
    """Return the fleet with self-distillation in every tier, each at its own cut."""
    tiers = {name: replace(tier, distill=DISTILLATION) for name, tier in fleet.tiers.items()}
    return replace(fleet, tiers=tiers)


DEPTHFL = Recipe("DepthFL", depthfl, distilling)
