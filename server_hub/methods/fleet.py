"""What the tiers of a fleet train, and the recipe of a method by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from edge_sdk.protocol.tensors import State
from export.split import SplitModel
from export.whole import without_trunk
from export.writer import Tier
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.method import Method


@dataclass(frozen=True)
class Fleet:
    """A model and the tiers that train it.

    Attributes:
        model: the whole model, as the hub holds it.
        tiers: what is exported for each tier.
        example: inputs (rows, ...), to see what they look like.
        classes: number of classes.
        models: the models of tiers whose layers are not the hub's.
        options: cuts that devices may move to, beside the cut of their tier.
        cut_rank: rank of adapters at a cut; None for the rank of all blocks.
        assignment: which base networks devices train; None for a single model.
        bases: initial tensors of the base networks, each (bases, ...); empty for a single model.
    """

    model: SplitModel
    tiers: Mapping[str, Tier]
    example: Tensor
    classes: int
    models: Mapping[str, SplitModel] = field(default_factory=dict)
    options: tuple[int, ...] = ()
    cut_rank: int | None = None
    assignment: BaseAssignment | None = None
    bases: State = field(default_factory=dict)

    def model_of(self, tier: str) -> SplitModel:
        """The model that a tier trains a part of."""
        return self.models.get(tier, self.model)


@dataclass(frozen=True)
class JobOutline:
    """What a method can base its composition on.

    Attributes:
        rounds: number of rounds of the job.
        local_epochs: epochs on the devices in a round.
        share: part of the devices that takes part in a round, from 0 to 1.
        optimizer: name of the devices' optimizer.
        cut_rank: rank of adapters at a cut; None for the rank of all blocks.
        assignment: which base networks devices train; None for a single model.
        split: whether a tier trains base networks up to a cut, not as a whole.
    """

    rounds: int
    local_epochs: int = 1
    share: float = 1.0
    optimizer: str = "sgd"
    cut_rank: int | None = None
    assignment: BaseAssignment | None = None
    split: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to set up a method.

    Attributes:
        title: name for tables.
        compose: makes the method, from the initial tensors of the whole model.
        arrange: what a simulated fleet trains with the method, from what it would train with
            FedSplitX.
        pooled: in simulations, all data lie in one place, on a device that takes part in every
            round.
        takes_whole: a tier may be cut behind the last block; its devices train the whole model.
        trains_bases: the method trains base networks, and needs bundles of such.
    """

    title: str
    compose: Callable[[State, JobOutline], Method]
    arrange: Callable[[Fleet], Fleet] = lambda fleet: fleet
    pooled: bool = False
    takes_whole: bool = False
    trains_bases: bool = False


def at_poorest_cut(fleet: Fleet) -> Fleet:
    """Every tier at the cut of the poorest."""
    cut = min(tier.cut for tier in fleet.tiers.values())
    return replace(fleet, tiers={n: replace(t, cut=cut) for n, t in fleet.tiers.items()})


def whole_on_device(fleet: Fleet) -> Fleet:
    """Every tier trains the whole model, whether it could carry it or not."""
    depth = fleet.model.depth
    return replace(
        fleet,
        model=without_trunk(fleet.model),
        tiers={n: replace(t, cut=depth) for n, t in fleet.tiers.items()},
    )
