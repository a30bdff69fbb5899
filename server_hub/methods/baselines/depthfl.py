"""DepthFL (Kim et al., ICLR 2023): models of several depths, classifiers at every depth.

A device trains the blocks that it can carry and a classifier at each tier's depth; its classifiers
also learn from each other (self-distillation, in the step graph). Layers are averaged over the
devices that hold them. There is no hub to train what is deeper than the deepest tier, so the
largest model is that tier's.
"""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.protocol.tensors import State
from server_hub.methods.baselines.fedavg import fedavg
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method

DISTILLATION = 1.0
"""Weight of the classifiers' divergence from each other."""


def depthfl(initial: State, outline: JobOutline) -> Method:
    """DepthFL on the hub's side is federated averaging over layers."""
    return replace(fedavg(initial, outline), name="DepthFL")


def distilling(fleet: Fleet) -> Fleet:
    """Every tier at its own cut, its classifiers teaching each other."""
    tiers = {name: replace(tier, distill=DISTILLATION) for name, tier in fleet.tiers.items()}
    return replace(fleet, tiers=tiers)


DEPTHFL = Recipe("DepthFL", depthfl, distilling)
