"""FjORD (Horvath et al., NeurIPS 2021): nested models of several widths, whole on the devices.

A device of width ``p`` holds the leading part of every layer's channels, as wide as its tier can
carry: the widest whose training step takes no more operations than the tier's segment does with
FedSplitX. In each step it draws a width up to its own and trains that part alone (ordered
dropout). An element of a tensor is averaged over the devices that hold it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from export.flops import flops_per_row
from export.optimizers import get_optimizer
from export.packing import get_codec
from export.split import ClientSegment
from export.steps import ClientSteps
from export.whole import without_trunk
from export.width import narrow, ordered_dropout, widths_within
from server_hub.aggregation.nested import Nested
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, always

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def fjord(initial: State, outline: JobOutline) -> Method:
    """Nested averaging: no activations, no trunk."""
    return Method(
        name="FjORD",
        stage=always(ActivationMode.NONE),
        aggregation=Nested(initial),
        paths=("device_alone",),
    )


def by_width(fleet: Fleet) -> Fleet:
    """Every tier holds the whole depth, as wide as it can carry."""
    return nested(fleet, widths_within(fleet.model, _budgets(fleet), WIDTHS, fleet.example), WIDTHS)


def nested(fleet: Fleet, own: Mapping[str, float], widths: Collection[float]) -> Fleet:
    """Every tier holds the whole depth in its ``own`` width, and trains all ``widths`` up to it."""
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
    """FLOPs per sample of the training step of each tier's segment."""
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
        budgets[name] = flops_per_row(steps.train())
    return budgets


FJORD = Recipe("FjORD", fjord, by_width)
