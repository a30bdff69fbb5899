"""What the tiers of a fleet train: the model, and where it is cut for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from export.split import SplitModel
from export.whole import without_trunk
from export.writer import Tier
from server_hub.aggregation.layer_store import State
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
        options: cuts that devices may move to, beside that of their tier.
        cut_rank: rank of adapters at a cut; None for that of all.
        mixing: how bases are trained, where a model is split into some.
        bases: their initial tensors, each (bases, ...); empty for one model.
    """

    model: SplitModel
    tiers: Mapping[str, Tier]
    example: Tensor
    classes: int
    models: Mapping[str, SplitModel] = field(default_factory=dict)
    options: tuple[int, ...] = ()
    cut_rank: int | None = None
    mixing: BaseAssignment | None = None
    bases: State = field(default_factory=dict)

    def model_of(self, tier: str) -> SplitModel:
        """The model that a tier trains a part of."""
        return self.models.get(tier, self.model)


@dataclass(frozen=True)
class JobOutline:
    """What a composition may go by.

    Attributes:
        rounds: rounds of the job.
        local_epochs: epochs on the devices in a round.
        share: part of the devices that takes part in a round.
        optimizer: of the devices.
        cut_rank: rank of adapters at a cut; None for that of all.
        mixing: how bases are trained, where a model is split into some.
        split: whether some tier trains them up to a cut.
    """

    rounds: int
    local_epochs: int = 1
    share: float = 1.0
    optimizer: str = "sgd"
    cut_rank: int | None = None
    mixing: BaseAssignment | None = None
    split: bool = False


@dataclass(frozen=True)
class Recipe:
    """A method by name.

    Attributes:
        title: for tables.
        compose: the method, from the whole model's initial tensors.
        arrange: what the fleet trains with it, from what it would train with FedSplitX.
        pooled: all data lie in one place, on a device that takes part in every round.
        takes_whole: a tier may be cut behind the last block: its devices train all of the model.
    """

    title: str
    compose: Callable[[State, JobOutline], Method]
    arrange: Callable[[Fleet], Fleet] = lambda fleet: fleet
    pooled: bool = False
    takes_whole: bool = False


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
