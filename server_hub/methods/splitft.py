"""SplitFT (https://arxiv.org/abs/2604.26388): split fine-tuning of a model with adapters.

::

    per batch: device forward -> activations up; trunk forward, loss, backward, step;
               gradient at the cut down; device backward, step
    per round: adapters up, averaged layer by layer over the copies of each layer; cuts adjusted

Every device has its own cut, and the hub may move it (:mod:`server_hub.rounds.cut_policy`). All
devices share one trunk, whose steps merge the batches of devices at different cuts. The weights of
the base model are frozen and are never sent. Devices and hub exchange adapters and optimizer slots.
A layer that moves from a device to the hub, or back, therefore keeps its training state.
"""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.adapters import MergedAdapters
from server_hub.methods.fleet import Fleet, JobOutline, Recipe
from server_hub.methods.method import Method, always


def splitft_u(initial: State, outline: JobOutline) -> Method:
    """SplitFT with labels on the devices.

    Every device holds a copy of the model's head; the copies are averaged. A tensor that is tied to
    the stem is then trained on the devices alone. The arguments are those of :func:`splitft`.
    """
    method = splitft(initial, replace(outline, tied=()))
    return replace(method, stage=always(ActivationMode.U_SHAPED))


def splitft(initial: State, outline: JobOutline) -> Method:
    """SplitFT with labels on the hub.

    Args:
        initial: tensors of the whole model by name.
        outline: outline of the job, with the devices' optimizer and the rank at a cut.
    """
    return Method(
        name="SplitFT",
        stage=always(ActivationMode.RETURNED),
        aggregation=MergedAdapters(initial, outline.optimizer, outline.cut_rank, outline.tied),
        paths=("through_hub",),
        keeps_slots=True,
    )


def moving(fleet: Fleet) -> Fleet:
    """Return the fleet with a bundle for every cut that a device may have.

    The bundle of another cut than the tier's own is that of a further tier ``TIER@CUT``.
    """
    tiers = {}
    for name, tier in fleet.tiers.items():
        tiers[name] = replace(tier, cut_rank=fleet.cut_rank)
        for cut in fleet.options:
            if cut != tier.cut:
                tiers[f"{name}@{cut}"] = replace(tiers[name], cut=cut)
    return replace(fleet, tiers=tiers)


SPLITFT = Recipe("SplitFT", splitft, moving, graphs=("backward",))
SPLITFT_U = Recipe(
    "SplitFT (labels on the devices)", splitft_u, moving, graphs=("backward", "finish")
)
