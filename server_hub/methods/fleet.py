"""A fleet, the outline of a job, and recipes that set up a method for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from edge_sdk.protocol.tensors import State
from export.bases.exported import without_trunk
from export.cutting.split_model import SplitModel
from server_hub.aggregation.robust import RuleName
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.method import Method

if TYPE_CHECKING:
    # loads the compilers of the export, which a hub does not need
    from export.bundles.writer import Tier


@dataclass(frozen=True)
class Fleet:
    """A model, and the tiers of devices that train it.

    Attributes:
        model: the whole model on the hub.
        tiers: settings of the export by tier.
        example: example inputs (rows, ...), for their shape and dtype.
        classes: number of classes; for a model of tokens the size of the vocabulary.
        models: by tier, the model of a tier whose layers differ from those of the hub's model.
        options: cuts that devices may move to, beside the cut of their tier.
        cut_rank: rank of adapters at a cut; None for the rank of all blocks.
        assignment: assigns base networks to devices; None for a single model.
        bases: initial tensors of the base networks by name, each (bases, ...); empty for a single
            model.
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
        """Return the model whose first blocks a tier trains."""
        return self.models.get(tier, self.model)


@dataclass(frozen=True)
class JobOutline:
    """The facts about a job that a method's composition depends on.

    Attributes:
        rounds: number of rounds of the job.
        local_epochs: number of local epochs on a device in a round.
        share: fraction of the devices that take part in a round, above 0 and at most 1.
        optimizer: name of the devices' optimizer.
        cut_rank: rank of adapters at a cut; None for the rank of all blocks.
        assignment: assigns base networks to devices; None for a single model.
        split: whether at least one tier is cut, so that activations go to the hub.
        rule: name of the rule that averages the copies of a layer.
        tied: names of the trained tensors of the stem that the model's head reads as well.
    """

    rounds: int
    local_epochs: int = 1
    share: float = 1.0
    optimizer: str = "sgd"
    cut_rank: int | None = None
    assignment: BaseAssignment | None = None
    split: bool = False
    rule: RuleName = "mean"
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe sets up a training method, for a hub or for a simulated fleet.

    Attributes:
        title: name for tables.
        compose: composes the method from the initial tensors of the whole model by name, and the
            outline of the job.
        arrange: adapts a simulated fleet to the method. The given fleet is that of FedSplitX.
        graphs: optional step graphs that the bundle of every tier must have, see
            :data:`export.steps.graph_names.NEEDS`; a simulation adds them to its tiers.
        pooled: whether a simulation keeps all data in one place, on a device that takes part in
            every round.
        takes_whole: whether a tier may be cut behind the last block, so that its devices train the
            whole model.
        trains_bases: whether the method trains base networks, and needs bundles of base networks.
        takes_rule: whether the method averages with any rule, not only with the mean.
    """

    title: str
    compose: Callable[[State, JobOutline], Method]
    arrange: Callable[[Fleet], Fleet] = lambda fleet: fleet
    graphs: tuple[str, ...] = ()
    pooled: bool = False
    takes_whole: bool = False
    trains_bases: bool = False
    takes_rule: bool = False

    def fleet(self, fleet: Fleet) -> Fleet:
        """Return the given fleet as the method needs it, with its graphs in every bundle."""
        fleet = self.arrange(fleet)
        tiers = {n: replace(t, graphs=[*t.graphs, *self.graphs]) for n, t in fleet.tiers.items()}
        return replace(fleet, tiers=tiers)


def arrays(tensors: Mapping[str, Tensor]) -> State:
    """Return copies of tensors as arrays, by name."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def at_poorest_cut(fleet: Fleet) -> Fleet:
    """Return the fleet with every tier at the shallowest cut of any tier."""
    cut = min(tier.cut for tier in fleet.tiers.values())
    return replace(fleet, tiers={n: replace(t, cut=cut) for n, t in fleet.tiers.items()})


def whole_on_device(fleet: Fleet) -> Fleet:
    """Return the fleet with the whole model on the devices of every tier, whatever they carry."""
    depth = fleet.model.depth
    return replace(
        fleet,
        model=without_trunk(fleet.model),
        tiers={n: replace(t, cut=depth) for n, t in fleet.tiers.items()},
    )
