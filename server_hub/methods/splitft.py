"""SplitFT (https://arxiv.org/abs/2604.26388): split fine-tuning of a model with adapters.

::

    per batch: device forward -> activations up; trunk forward, loss, backward, step;
               gradient at the cut down; device backward, step
    per round: adapters up, averaged layer by layer over the copies of each layer; cuts adjusted

Every device has a cut of its own, and it may move (:mod:`server_hub.rounds.cut_policy`). The trunk
is one for all, and its steps merge what devices at different cuts have sent. The base is frozen
and stays
where it is: what travels are adapters and the optimizers' slots, so a layer goes on where it was
when it moves from a device to the hub, or back.
"""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.adapters import MergedAdapters
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, always


def splitft_u(initial: State, outline: JobOutline) -> Method:
    """The same, and labels stay on the devices: these have the model's head, which is averaged."""
    return replace(splitft(initial, outline), stage=always(ActivationMode.U_SHAPED))


def splitft(initial: State, outline: JobOutline) -> Method:
    """Merged trunk, gradients that come back, adapters and slots in one store."""
    return Method(
        name="SplitFT",
        stage=always(ActivationMode.RETURNED),
        aggregation=MergedAdapters(initial, outline.optimizer, outline.cut_rank),
        paths=("through_hub",),
        keeps_slots=True,
    )


def moving(fleet: Fleet) -> Fleet:
    """A bundle for every cut that a device of a tier may have, with graphs that take gradients.

    A further one is called ``TIER@CUT``.
    """
    tiers = {}
    for name, tier in fleet.tiers.items():
        tiers[name] = replace(tier, returned=True, cut_rank=fleet.cut_rank)
        for cut in fleet.options:
            if cut != tier.cut:
                tiers[f"{name}@{cut}"] = replace(tiers[name], cut=cut)
    return replace(fleet, tiers=tiers)


def with_heads(fleet: Fleet) -> Fleet:
    """The same, with the model's head on every device."""
    fleet = moving(fleet)
    return replace(fleet, tiers={n: replace(t, u_shaped=True) for n, t in fleet.tiers.items()})


SPLITFT = Recipe("SplitFT", splitft, moving)
SPLITFT_U = Recipe("SplitFT (labels on the devices)", splitft_u, with_heads)
