"""Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747): mixtures of base networks.

A wide model is split by width into K independent *base networks*. Each round::

    hub    : a device with a budget of b trains n = b K bases: the first from one shuffled queue,
             in which each base comes once before any comes again, the others at random
    device : E local epochs on each of its bases, and on adversarial examples that it makes
    hub    : each base becomes the mean of its copies, weighted by samples; untrained bases stay
    answer : the mean of the logits of any number of bases, the best first

A tier whose cut is the depth of the model trains whole bases. The other tiers train their bases up
to their cut, as in FedSplitX: with auxiliary heads at the cut, and activations to the hub. The
trunk trains the deep part of all bases in one step (:mod:`server_hub.trunk.vmapped`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_sdk.bundle.manifest import Manifest, tensor_of
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from export.bases.dual_norms import noise_tensors
from export.bases.exported import whole_bases
from export.bases.split_width import split_width
from export.cutting.split_model import SplitModel, statistics
from server_hub.aggregation.per_base import PerBase
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, Stage, always
from server_hub.methods.plan import DevicePlan, RoundContext, RoundPlan
from server_hub.trunk.interface import TrunkPlan


@dataclass
class BaseQueue:
    """The queue of first base networks.

    Attributes:
        place: number of devices that have taken from the queue.
    """

    place: int = 0


@dataclass(frozen=True, kw_only=True)
class SplitMix(Method):
    """The method Split-Mix.

    Attributes:
        assignment: assigns base networks to devices, and sets their loss.
        queue: the queue of first base networks.
    """

    assignment: BaseAssignment
    queue: BaseQueue = field(default_factory=BaseQueue)

    def plan(self, context: RoundContext) -> RoundPlan:
        """Return the plan of a round, with base networks drawn for every member."""
        plan = super().plan(context)
        tiers = {name: device.tier for name, device in plan.devices.items()}
        drawn = self.assignment.draw(context.number, self.queue.place, tiers)
        self.queue.place += len(tiers)
        noise = noise_tensors(context.model)
        devices = {
            name: self._with_bases(device, context.ready[name].manifest, drawn[name], noise)
            for name, device in plan.devices.items()
        }
        return replace(plan, devices=devices)

    def state(self) -> dict[str, Any]:
        """See :meth:`Method.state`."""
        return super().state() | {"place": self.queue.place}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Method.restore`."""
        super().restore(state)
        self.queue.place = state["place"]

    def _with_bases(
        self, plan: DevicePlan, manifest: Manifest, bases: list[int], noise: set[str]
    ) -> DevicePlan:
        """Return the plan of a device that trains ``bases``.

        Args:
            plan: the device's plan without base networks.
            manifest: manifest of the device's tier.
            bases: numbers of the base networks.
            noise: names of the tensors of noise norms.
        """
        assignment = self.assignment
        adversarial = _trains_adversarially(assignment, manifest)
        # only adversarial examples train the noise norms
        untrained = set() if adversarial else {tensor_of(b, n) for b in bases for n in noise}
        return replace(
            plan,
            hyper={
                **plan.hyper,
                **assignment.hyper(adversarial=manifest.adversarial_graph is not None),
            },
            bases=tuple(bases),
            passes=len(bases) * (2 if adversarial else 1),
            adversarial=assignment.robustness if adversarial else None,
            untrained=frozenset(untrained),
        )

    def trunk_plan(self, context: RoundContext, stage: Stage) -> TrunkPlan:
        """Return the plan of the trunk, which trains all base networks in one step."""
        return replace(super().trunk_plan(context, stage), bases=self.assignment.bases)

    def check_bundles(
        self,
        manifests: Mapping[str, Manifest],
        model: SplitModel,
        modes: Collection[ActivationMode],
    ) -> None:
        """Check that every tier can train a base network, and that the trunk can train cut ones.

        Args:
            manifests: manifest by tier.
            model: the hub's model.
            modes: activation modes of the job's rounds.

        Raises:
            ConfigError: a budget is below one base network, a budget is for a tier without a
                bundle, batch norms lie above a cut, or no tier can make adversarial examples.
        """
        super().check_bundles(manifests, model, modes)
        assignment = self.assignment
        for tier in assignment.budgets:
            if tier not in manifests:
                raise ConfigError(
                    f"[mix] has a budget for a tier {tier!r}, and there is none; there are "
                    f"{', '.join(manifests)}"
                )
        for tier, manifest in manifests.items():
            assignment.count(tier)
            if not manifest.whole and statistics(model.block[manifest.cut :]):
                raise ConfigError(
                    f"the bases have batch norms above cut {manifest.cut} of tier {tier!r}, and "
                    "the trunk trains all bases in one batch; use GroupNorm, or cut behind the "
                    "last block"
                )
        if assignment.robustness and all(m.adversarial_graph is None for m in manifests.values()):
            raise ConfigError(
                f"robustness is {assignment.robustness:g} in [mix], and no tier makes adversarial "
                'examples; export some with graphs = ["adversarial_train"] in tiers.toml, or '
                "leave robustness out"
            )


def _trains_adversarially(assignment: BaseAssignment, manifest: Manifest) -> bool:
    """Return whether devices with this manifest train on adversarial examples."""
    return assignment.robustness > 0 and manifest.adversarial_graph is not None


def splitmix(initial: State, outline: JobOutline) -> Method:
    """Compose Split-Mix.

    Args:
        initial: initial trained tensors by name, each (bases, ...).
        outline: outline of the job, with an assignment of base networks.
    """
    assert outline.assignment is not None
    return SplitMix(
        name="Split-Mix",
        stage=always(ActivationMode.TRAIN if outline.split else ActivationMode.NONE),
        aggregation=PerBase(initial),
        paths=("mix",),
        assignment=outline.assignment,
    )


def by_bases(fleet: Fleet) -> Fleet:
    """Return the fleet with base networks on the devices of every tier, whole or up to the cut.

    Raises:
        ConfigError: the budget of a tier is below one base network.
    """
    assert fleet.assignment is not None
    for name in fleet.tiers:
        fleet.assignment.count(name)
    bases = split_width(
        fleet.model, fleet.assignment.bases, fleet.example, seed=fleet.assignment.seed
    )
    if fleet.assignment.robustness and fleet.assignment.dual_norms:
        bases = bases.with_dual_norms()
    depth = fleet.model.depth
    cuts = {tier.cut for tier in fleet.tiers.values() if tier.cut < depth}
    found = whole_bases(bases, cuts, fleet.example, fleet.classes)
    tiers = {
        name: replace(
            tier,
            bases=fleet.assignment.bases,
            graphs=tier.graphs if fleet.assignment.robustness else (),
        )
        for name, tier in fleet.tiers.items()
    }
    models = {name: found.whole for name, tier in tiers.items() if tier.cut == depth}
    return replace(fleet, model=found.hub, tiers=tiers, models=models, bases=found.states)


SPLITMIX = Recipe("Split-Mix", splitmix, by_bases, takes_whole=True, trains_bases=True)
