"""FjORD (Horvath et al., NeurIPS 2021): nested models of several widths, whole on the devices.

A device of width ``p`` holds the leading fraction ``p`` of the channels of every layer. Its width
is the largest whose training step takes no more operations than the tier's client segment with
FedSplitX. In each step the device draws a width up to its own and trains that part alone (ordered
dropout). Each element of a tensor is averaged over the devices that hold it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from export.bases.exported import without_trunk
from export.bases.narrow import narrow
from export.cutting.split_model import ClientSegment
from export.packing.codecs import get_codec
from export.planning.flops import flops_per_row
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.train import train
from server_hub.aggregation.nested import Nested
from server_hub.methods.baselines.ordered_dropout import ordered_dropout
from server_hub.methods.baselines.widths import widths_within
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, always

WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Widths of the nested models, as fractions of the channels."""


def fjord(initial: State, outline: JobOutline) -> Method:
    """Compose FjORD; the arguments are those of :attr:`Recipe.compose`."""
    return Method(
        name="FjORD",
        stage=always(ActivationMode.NONE),
        aggregation=Nested(initial),
        paths=("device_alone",),
    )


def by_width(fleet: Fleet) -> Fleet:
    """Return the fleet with the whole depth on every tier, as wide as the tier can carry."""
    return nested(fleet, widths_within(fleet.model, _budgets(fleet), WIDTHS, fleet.example), WIDTHS)


def nested(fleet: Fleet, own: Mapping[str, float], widths: Collection[float]) -> Fleet:
    """Return the fleet with the whole depth on every tier, in nested widths.

    Args:
        fleet: the fleet of FedSplitX.
        own: width of the model of each tier, a fraction of the channels, by tier.
        widths: the widths that devices draw from; a device draws none above its own.
    """
    models = {}
    for name, width in own.items():
        model = narrow(fleet.model, width, fleet.example)
        ordered_dropout(model, [w / width for w in widths if w <= width], fleet.example)
        models[name] = without_trunk(model)
    return replace(
        fleet,
        model=without_trunk(fleet.model),
        tiers={n: replace(t, cut=fleet.model.depth) for n, t in fleet.tiers.items()},
        models=models,
    )


def _budgets(fleet: Fleet) -> dict[str, float]:
    """Return the FLOPs per sample of a training step of each tier's client segment, by tier."""
    fleet.model.add_heads([t.cut for t in fleet.tiers.values()], fleet.example, fleet.classes)
    budgets = {}
    for name, tier in fleet.tiers.items():
        steps = ClientSteps(
            ClientSegment(fleet.model, tier.cut),
            get_optimizer("sgd"),
            get_codec(tier.codec),
            fleet.example,
            fleet.classes,
        )
        budgets[name] = flops_per_row(train(steps))
    return budgets


FJORD = Recipe("FjORD", fjord, by_width)
