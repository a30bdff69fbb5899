"""AccSFL (Han et al., 2021): split learning on locally generated losses.

All tiers have the cut of the poorest tier and one auxiliary head. The loss of this head trains the
client segment, so that devices do not wait for gradients. Devices send the activations of their
training steps. Each device's activations train a separate copy of the trunk. The copies of the
trunk and the client segments are averaged after the round.
"""

from __future__ import annotations

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut
from server_hub.methods.method import CopyPerDevice, Method, always


def accsfl(initial: State, outline: JobOutline) -> Method:
    """Compose AccSFL; the arguments are those of :attr:`Recipe.compose`."""
    return Method(
        name="AccSFL",
        stage=always(ActivationMode.TRAIN),
        copies=CopyPerDevice(),
        aggregation=Merged(initial),
    )


ACCSFL = Recipe("AccSFL", accsfl, at_poorest_cut)
