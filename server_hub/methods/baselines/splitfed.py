"""SplitFed (Thapa et al., AAAI 2022): gradients come back for every batch.

One cut for all, that of the poorest tier. A device sends a batch's activations, waits for their
gradient, and steps its side with that alone. In version 1 each device has a copy of the server's
side, and the copies are averaged after the round; in version 2 there is one server's side, which
takes the batches one after the other. The devices' sides are averaged in both.
"""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import Fleet, JobOutline, Recipe, at_poorest_cut
from server_hub.methods.method import CopyPerDevice, Method, SharedCopy, always


def splitfed_v1(initial: State, outline: JobOutline) -> Method:
    """A copy of the trunk per device."""
    return Method(
        name="SplitFed v1",
        stage=always(ActivationMode.RETURNED),
        copies=CopyPerDevice(),
        aggregation=Merged(initial),
        paths=("through_hub",),
        merges=False,
    )


def splitfed_v2(initial: State, outline: JobOutline) -> Method:
    """One trunk, batch after batch."""
    return replace(splitfed_v1(initial, outline), name="SplitFed v2", copies=SharedCopy())


def returning(fleet: Fleet) -> Fleet:
    """One cut, and step graphs that take a gradient."""
    fleet = at_poorest_cut(fleet)
    return replace(fleet, tiers={n: replace(t, returned=True) for n, t in fleet.tiers.items()})


SPLITFED_V1 = Recipe("SplitFed v1", splitfed_v1, returning)
SPLITFED_V2 = Recipe("SplitFed v2", splitfed_v2, returning)
