"""A training method: a composition of parts that plans every round of a job."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from export.cutting.split_model import SplitModel
from server_hub.aggregation.interface import Aggregation, DeviceUpdate
from server_hub.aggregation.layer_store import NotFinite, check_finite
from server_hub.aggregation.update_bound import UpdateBound
from server_hub.methods.plan import DevicePlan, RoundContext, RoundPlan
from server_hub.methods.settings import LocalTraining
from server_hub.trunk.interface import EvaluationReport, TrunkCopy, TrunkPlan
from server_hub.trunk.settings import TrunkTraining

log = logging.getLogger("cutlayer.hub")

SEED_STRIDE = 1_000_003
"""A device's seed is the number of the round times this, plus the device's place in the round."""

Path = Literal["device_alone", "through_hub", "ensemble", "mix"]
"""A way to answer: with the device's deepest head, with the model's head on the hub, with the
ensemble of all heads, or with the mixture of all base networks."""

ALL_PATHS: tuple[Path, ...] = ("device_alone", "through_hub", "ensemble")
"""All ways to answer with a single model."""


_GRAPHS: dict[ActivationMode, tuple[str, ...]] = {
    ActivationMode.RETURNED: ("backward",),
    ActivationMode.U_SHAPED: ("backward", "finish"),
    ActivationMode.FUSED: ("fuse",),
}
"""The optional step graphs that a device needs in each activation mode."""


def takes_max_norm(manifest: Manifest) -> bool:
    """Return whether the graphs of a bundle clip gradients; those of older exports do not."""
    return any(port.spec.name == "max_norm" for port in manifest.graphs["train"].inputs)


class ServerCopies(Protocol):
    """Decides which copy of the trunk a device's activations train."""

    def replica_of(self, device: str) -> str:
        """Return the name of the copy for the device of this name."""


class SharedCopy:
    """One trunk for all devices; a step may merge batches of several devices."""

    def replica_of(self, device: str) -> str:
        return "shared"


class CopyPerDevice:
    """One copy of the trunk per device; all copies start the round from the same weights."""

    def replica_of(self, device: str) -> str:
        return device


@dataclass(frozen=True)
class Stage:
    """The settings of a round that are the same for all devices.

    Attributes:
        activations: when devices send activations, and what the hub sends back.
        local_epochs: number of local epochs on a device; None for the configured number.
        trunk_epochs: number of passes of the trunk over the round's activations.
        everyone: whether all ready devices take part, not only the drawn ones.
        anneal: whether the trunk's learning rate falls from its full value to zero within the
            round.
    """

    activations: ActivationMode
    local_epochs: int | None = None
    trunk_epochs: int = 1
    everyone: bool = False
    anneal: bool = False


def always(activations: ActivationMode, trunk_epochs: int = 1) -> Callable[[int, int], Stage]:
    """Return a :attr:`Method.stage` with the same stage in every round.

    Args:
        activations: as in :class:`Stage`.
        trunk_epochs: as in :class:`Stage`.
    """
    stage = Stage(activations, trunk_epochs=trunk_epochs)
    return lambda position, count: stage


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method as a composition of parts.

    A method that needs more than the parts offer overrides :meth:`device_plan`,
    :meth:`trunk_plan` or :meth:`check_bundles`.

    Attributes:
        name: name for reports.
        stage: returns the stage of round ``position`` of ``count``, given both; positions start at
            1.
        aggregation: holds the global model, and averages into it.
        copies: decides which copy of the trunk a device's activations train.
        paths: the ways to answer that the method trains.
        merges: whether the trunk merges batches into one step. Otherwise it makes one step per
            batch.
        keeps_slots: whether optimizer slots are averaged, and sent to devices, as parameters are.
            Otherwise every round starts with new optimizers.
        bound: clips the updates of devices before they are averaged.
    """

    name: str
    stage: Callable[[int, int], Stage]
    aggregation: Aggregation
    copies: ServerCopies = field(default_factory=SharedCopy)
    paths: tuple[Path, ...] = ALL_PATHS
    merges: bool = True
    keeps_slots: bool = False
    bound: UpdateBound = field(default_factory=UpdateBound)

    def plan(self, context: RoundContext) -> RoundPlan:
        """Return the plan of a round."""
        stage = self.stage(context.position, context.count)
        members = sorted(context.ready if stage.everyone else context.drawn)
        return RoundPlan(
            devices={
                name: self.device_plan(context, stage, name, order)
                for order, name in enumerate(members)
            },
            trunk=self.trunk_plan(context, stage),
            state=self.aggregation.trunk_state(context.cuts),
            average=self.average,
        )

    def average(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        """Average a round into the global model, with the updates of devices clipped.

        A layer whose copy of the trunk is not finite keeps what devices have trained, or its
        present value.

        Args:
            updates: finite updates of devices.
            copies: layers that the trunk has trained.
        """
        finite = []
        for copy in copies:
            try:
                check_finite(copy.tensors)
                finite.append(copy)
            except NotFinite as error:
                log.warning("the trunk's %s is left out of the average: %s", copy.layer, error)
        self.aggregation.commit(self.bound.apply(self.aggregation, updates), finite)

    def state(self) -> dict[str, Any]:
        """Return what the method remembers between rounds beside the model, as JSON can hold it."""
        return {"bound": self.bound.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what the method remembers to a value that :meth:`state` returned."""
        self.bound.restore(state["bound"])

    def device_plan(
        self, context: RoundContext, stage: Stage, device: str, order: int
    ) -> DevicePlan:
        """Return the plan of one device.

        Args:
            context: the facts that the plan depends on.
            stage: stage of the round.
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
            hyper=self._hyper(context, participant.manifest),
            seed=context.number * SEED_STRIDE + order,
            staleness=local.staleness if returned else 0,
            replica=self.copies.replica_of(device),
            passes=local.epochs if returned else 1,
        )

    def _hyper(self, context: RoundContext, manifest: Manifest) -> dict[str, float]:
        """Return the hyper-parameters of a device's graphs; bundles may lack ``max_norm``."""
        local = context.local
        hyper = {**local.hyper, "lr": local.hyper["lr"] * context.rate}
        if takes_max_norm(manifest):
            hyper["max_norm"] = 0.0 if local.max_norm == math.inf else local.max_norm
        return hyper

    def trunk_plan(self, context: RoundContext, stage: Stage) -> TrunkPlan:
        """Return the plan of the trunk."""
        settings = context.trunk
        rate = 1.0 if stage.anneal else context.rate
        return TrunkPlan(
            settings.optimizer,
            {**settings.hyper, "lr": settings.hyper["lr"] * rate},
            stage.trunk_epochs,
            settings.max_rows,
            seed=context.number,
            max_norm=settings.max_norm,
            decay=context.decay,
            precision=settings.precision,
            u_shaped=stage.activations is ActivationMode.U_SHAPED,
            returned=stage.activations.returns_gradients,
            anneal=stage.anneal,
            keeps_slots=self.keeps_slots,
            passes=context.local.epochs if stage.activations.returns_gradients else 1,
            max_tokens=settings.max_tokens,
            max_bytes=settings.max_mb * 2**20,
        )

    def check_bundles(
        self,
        manifests: Mapping[str, Manifest],
        model: SplitModel,
        modes: Collection[ActivationMode],
    ) -> None:
        """Check that the bundles have the graphs and tensors that the method needs.

        Args:
            manifests: manifest by tier.
            model: the hub's model.
            modes: activation modes of the job's rounds.

        Raises:
            ConfigError: a bundle lacks a graph, or holds tensors of another shape.
        """
        graphs = list(dict.fromkeys(graph for mode in modes for graph in _GRAPHS.get(mode, ())))
        for tier, manifest in manifests.items():
            missing = next((graph for graph in graphs if graph not in manifest.graphs), None)
            if missing is not None:
                raise ConfigError(
                    f"{self.name} needs the graph {missing!r}, and the bundle of {tier!r} lacks "
                    f"it; export with graphs = {json.dumps(graphs)} in tiers.toml"
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
        """Take the order of base networks from an evaluation, which may be one round old.

        Returns:
            Whether the order has changed, so that the hub must offer the model to devices again.
        """
        if not report.order or report.order == self.aggregation.order:
            return False
        self.aggregation.order = list(report.order)
        return True


def check_optimizers(
    method: Method,
    optimizer: str,
    manifests: Mapping[str, Manifest],
    local: LocalTraining,
    trunk: TrunkTraining,
) -> None:
    """Check that devices and trunk can train as the settings say.

    Args:
        method: the job's method.
        optimizer: name of the optimizer of the devices.
        manifests: manifest by tier.
        local: settings of the training on devices.
        trunk: settings of the training of the trunk.

    Raises:
        ConfigError: gradients are to be clipped, and the graphs of a bundle do not clip; or slots
            move between devices and trunk, which have different optimizers.
    """
    for tier, manifest in manifests.items():
        if local.max_norm < math.inf and not takes_max_norm(manifest):
            raise ConfigError(
                f"the bundle of {tier!r} does not clip gradients, it is from an older export; "
                "export again, or leave max_norm out of [local]"
            )
    if method.keeps_slots and optimizer != trunk.optimizer:
        raise ConfigError(
            f"{method.name} hands optimizer state on between devices and hub; the devices "
            f"have {optimizer}, set trunk.optimizer to it"
        )
