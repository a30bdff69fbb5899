"""AccSFL (Han et al., 2021): split learning on locally generated losses.

One cut for all, that of the poorest tier, and one auxiliary head, whose loss trains the devices'
side without waiting for gradients. Activations go up as they come; each device's train a copy of
the server's side of its own, and the copies are averaged after the round, as the devices' sides
are.
"""

from __future__ import annotations

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut
from server_hub.methods.method import CopyPerDevice, Method, always


def accsfl(initial: State, outline: JobOutline) -> Method:
    """One cut, one head, a copy of the trunk per device."""
    return Method(
        name="AccSFL",
        stage=always(ActivationMode.TRAIN),
        copies=CopyPerDevice(),
        aggregation=Merged(initial),
    )


ACCSFL = Recipe("AccSFL", accsfl, at_poorest_cut)
