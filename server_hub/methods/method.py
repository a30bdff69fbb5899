"""A training method: a composition of parts that plans every round of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from export.split import SplitModel
from server_hub.aggregation.interface import Aggregation
from server_hub.methods.plan import DevicePlan, RoundContext, RoundPlan
from server_hub.trunk.interface import EvaluationReport, TrunkPlan

SEED_STRIDE = 1_000_003
"""Seeds of devices are the round's number times this, plus the device's place in the round."""

Path = Literal["device_alone", "through_hub", "ensemble", "mix"]
"""A way to answer: the device's own heads, the model's head on the hub, all heads together; or all
base networks, mixed."""

ALL_PATHS: tuple[Path, ...] = ("device_alone", "through_hub", "ensemble")
"""The ways to answer with a single model."""

_GRAPHS = {
    ActivationMode.RETURNED: "backward",
    ActivationMode.U_SHAPED: "finish",
    ActivationMode.FUSED: "fuse",
}
"""The step graph that a device needs for gradients that come back."""


class ServerCopies(Protocol):
    """Which copy of the trunk a device's activations train."""

    def replica_of(self, device: str) -> str:
        """Name of the copy."""


class SharedCopy:
    """One trunk for all devices: their rows are merged into one batch."""

    def replica_of(self, device: str) -> str:
        return "shared"


class CopyPerDevice:
    """One trunk per device; all start the round from the same weights."""

    def replica_of(self, device: str) -> str:
        return device


@dataclass(frozen=True)
class Stage:
    """What happens in a round, the same for all devices.

    Attributes:
        activations: when devices send activations, and what comes back.
        local_epochs: epochs on the devices; None for as many as are configured.
        trunk_epochs: passes of the trunk over the round's activations.
        everyone: all devices that are ready take part, not only those that are drawn.
        anneal: the trunk's learning rate falls from its full value to zero within the round.
    """

    activations: ActivationMode
    local_epochs: int | None = None
    trunk_epochs: int = 1
    everyone: bool = False
    anneal: bool = False


def always(activations: ActivationMode, trunk_epochs: int = 1) -> Callable[[int, int], Stage]:
    """The same stage in every round; the arguments are those of :class:`Stage`."""
    stage = Stage(activations, trunk_epochs=trunk_epochs)
    return lambda position, count: stage


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method as a composition of parts.

    A method that needs more than the parts offer overrides :meth:`device_plan`,
    :meth:`trunk_plan` or :meth:`check_bundles`.

    Attributes:
        name: name for reports.
        stage: what happens in round ``position`` of ``count``, from 1 on.
        aggregation: the global model, and how it averages.
        copies: which copy of the trunk a device's activations train.
        paths: the ways to answer that the method trains.
        merges: whether the trunk merges batches into one step; otherwise each is a step of its
            own.
        keeps_slots: optimizer slots are averaged and handed on as the parameters are; otherwise
            every round starts with fresh optimizers.
    """

    name: str
    stage: Callable[[int, int], Stage]
    aggregation: Aggregation
    copies: ServerCopies = field(default_factory=SharedCopy)
    paths: tuple[Path, ...] = ALL_PATHS
    merges: bool = True
    keeps_slots: bool = False

    def plan(self, context: RoundContext) -> RoundPlan:
        """The plan of a round."""
        stage = self.stage(context.position, context.count)
        members = sorted(context.ready if stage.everyone else context.drawn)
        return RoundPlan(
            devices={
                name: self.device_plan(context, stage, name, order)
                for order, name in enumerate(members)
            },
            trunk=self.trunk_plan(context, stage),
            state=self.aggregation.trunk_state(context.cuts),
            average=self.aggregation.commit,
        )

    def device_plan(
        self, context: RoundContext, stage: Stage, device: str, order: int
    ) -> DevicePlan:
        """What one device does.

        Args:
            context: what the plan is based on.
            stage: what happens in the round.
            device: name of the device.
            order: place of the device among the round's members, from 0 on.
        """
        participant, local = context.ready[device], context.local
        mode = stage.activations
        returned = mode.returns_gradients
        return DevicePlan(
            tier=participant.tier,
            activations=ActivationMode.NONE if participant.manifest.whole else mode,
            epochs=local.epochs if stage.local_epochs is None else stage.local_epochs,
            batch_size=local.batch_size,
            hyper={**local.hyper, "lr": local.hyper["lr"] * context.rate},
            seed=context.number * SEED_STRIDE + order,
            staleness=local.staleness if returned else 0,
            replica=self.copies.replica_of(device),
            passes=local.epochs if returned else 1,
        )

    def trunk_plan(self, context: RoundContext, stage: Stage) -> TrunkPlan:
        """What the trunk does."""
        settings = context.trunk
        rate = 1.0 if stage.anneal else context.rate
        return TrunkPlan(
            settings.optimizer,
            {**settings.hyper, "lr": settings.hyper["lr"] * rate},
            stage.trunk_epochs,
            settings.max_rows,
            seed=context.number,
            max_norm=settings.max_norm,
            precision=settings.precision,
            u_shaped=stage.activations is ActivationMode.U_SHAPED,
            returned=stage.activations.returns_gradients,
            anneal=stage.anneal,
            keeps_slots=self.keeps_slots,
        )

    def check_bundles(
        self, manifests: Mapping[str, Manifest], model: SplitModel, rounds: int
    ) -> None:
        """Check that the bundles have the graphs and tensors that the method needs.

        Args:
            manifests: manifest by tier.
            model: the hub's model.
            rounds: number of rounds of the job.

        Raises:
            ConfigError: a bundle lacks a graph, or holds tensors of another shape.
        """
        mode = self.stage(1, rounds).activations
        graph = _GRAPHS.get(mode)
        for tier, manifest in manifests.items():
            if graph is not None and graph not in manifest.graphs:
                raise ConfigError(
                    f"{self.name} sends gradients back, and the bundle of {tier!r} has no "
                    f"graphs for them; export with {mode} = true in tiers.toml"
                )
            specs = manifest.exchanged(self.keeps_slots)
            state = self.aggregation.device_state(specs)
            for spec in specs:
                if state[spec.name].shape != spec.shape:
                    raise ConfigError(
                        f"{spec.name} is {list(spec.shape)} in the bundle of {tier!r} and "
                        f"{list(state[spec.name].shape)} in the model; other ranks at a cut are "
                        "for splitft, else leave cut_rank out of tiers.toml"
                    )

    def heed(self, report: EvaluationReport) -> bool:
        """Take in an evaluation, which may be of the round before the last.

        Returns:
            Whether devices are to be offered the model in another way.
        """
        if not report.order or report.order == self.aggregation.order:
            return False
        self.aggregation.order = list(report.order)
        return True
