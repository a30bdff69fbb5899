"""SplitFed (Thapa et al., AAAI 2022): the hub returns a gradient for every batch.

All tiers have the cut of the poorest tier. A device sends a batch's activations, waits for their
gradient, and trains its segment with this gradient alone. In version 1 each device has a copy of
the trunk, and the copies are averaged after the round. In version 2 there is one trunk, which takes
one batch after the other. Both versions average the client segments.
"""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut
from server_hub.methods.method import CopyPerDevice, Method, SharedCopy, always


def splitfed_v1(initial: State, outline: JobOutline) -> Method:
    """Compose version 1, with a copy of the trunk per device.

    The arguments are those of :attr:`Recipe.compose`.
    """
    return Method(
        name="SplitFed v1",
        stage=always(ActivationMode.RETURNED),
        copies=CopyPerDevice(),
        aggregation=Merged(initial),
        paths=("through_hub",),
        merges=False,
    )


def splitfed_v2(initial: State, outline: JobOutline) -> Method:
    """Compose version 2, with one trunk; the arguments are those of :func:`splitfed_v1`."""
    return replace(splitfed_v1(initial, outline), name="SplitFed v2", copies=SharedCopy())


SPLITFED_V1 = Recipe("SplitFed v1", splitfed_v1, at_poorest_cut, graphs=("backward",))
SPLITFED_V2 = Recipe("SplitFed v2", splitfed_v2, at_poorest_cut, graphs=("backward",))
