"""SuperSFL (https://arxiv.org/abs/2601.02092): a device learns from its heads and from the hub.

For every batch a gradient comes back, as in SplitFed. The device joins it with the gradient of its
own heads, by weights that follow both losses and the device's share of the blocks. While the hub is
away the device goes on with its heads alone. Every tier has its own cut, and there is one trunk for
all devices. Not implemented: the paper's super-network of widths, and its weights in the average.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, Stage, always
from server_hub.methods.plan import DevicePlan, RoundContext


@dataclass(frozen=True, kw_only=True)
class SuperSfl(Method):
    """Gradients of the device's heads and of the hub, fused on the device."""

    def device_plan(
        self, context: RoundContext, stage: Stage, device: str, order: int
    ) -> DevicePlan:
        """As of every method; the heads' gradient counts by the device's share of the blocks."""
        plan = super().device_plan(context, stage, device, order)
        share = context.ready[device].manifest.cut / context.model.depth
        return replace(plan, hyper={**plan.hyper, "own": share})


def supersfl(initial: State, outline: JobOutline) -> Method:
    """Merged trunk, fused gradients."""
    return SuperSfl(
        name="SuperSFL", stage=always(ActivationMode.FUSED), aggregation=Merged(initial)
    )


def fusing(fleet: Fleet) -> Fleet:
    """Step graphs that take both gradients."""
    return replace(fleet, tiers={n: replace(t, fused=True) for n, t in fleet.tiers.items()})


SUPERSFL = Recipe("SuperSFL", supersfl, fusing)
