"""SuperSFL (https://arxiv.org/abs/2601.02092): fused gradients of device and hub.

The hub returns a gradient for every batch, as in SplitFed. The device fuses it with the gradient of
its own heads. The weights of both depend on both losses and on the device's share of the blocks.
While the hub does not answer, the device trains with its heads alone. Every tier has its own cut,
and all devices share one trunk. The super-network of widths and the weights of the average, which
the paper has, are not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe
from server_hub.methods.method import Method, Stage, always
from server_hub.methods.plan import DevicePlan, RoundContext


@dataclass(frozen=True, kw_only=True)
class SuperSfl(Method):
    """The method SuperSFL."""

    def device_plan(
        self, context: RoundContext, stage: Stage, device: str, order: int
    ) -> DevicePlan:
        """Return the plan of one device, with its share of the blocks as the weight ``own``."""
        plan = super().device_plan(context, stage, device, order)
        share = context.ready[device].manifest.cut / context.model.depth
        return replace(plan, hyper={**plan.hyper, "own": share})


def supersfl(initial: State, outline: JobOutline) -> Method:
    """Compose SuperSFL.

    Args:
        initial: tensors of the whole model by name.
        outline: outline of the job.
    """
    return SuperSfl(
        name="SuperSFL",
        stage=always(ActivationMode.FUSED),
        aggregation=Merged(initial, outline.rule),
    )


SUPERSFL = Recipe("SuperSFL", supersfl, graphs=("fuse",), takes_rule=True)
