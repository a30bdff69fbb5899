"""FedSplitX (arXiv 2310.14579): several cut points, auxiliary heads, no gradient across the cut.

Each round::

    device of tier k: download segment and heads 1..d_k
                      E local epochs on the summed loss of its heads
                      activations and labels go up; segment and heads go up at the end
    trunk           : trains blocks d_k.., the heads above d_k and the true head on them
    aggregate       : per layer and per head, mean over the copies trained this round

The default form merges: one trunk trained by all devices' rows together, and a layer that devices
and trunk both trained is one layer, weighted by samples. The paper's form keeps two stores that
never meet, one replica of the trunk per device, unweighted means, activations from a pass before
local training, and as many epochs on the trunk as on the device.
"""

from __future__ import annotations

from typing import Literal

from server_hub.aggregation.layer_store import State
from server_hub.aggregation.merged import Merged
from server_hub.aggregation.separate import Separate
from server_hub.methods.method import CopyPerDevice, Method, SharedCopy, Stage, always

Form = Literal["merged", "paper"]


def fedsplitx(initial: State, form: Form = "merged", local_epochs: int = 1) -> Method:
    """FedSplitX as a composition.

    Args:
        initial: the whole model's tensors by name.
        form: ``merged``, or ``paper`` for reproduction.
        local_epochs: epochs on the devices; the paper's form trains the trunk as often.
    """
    if form == "merged":
        return Method(
            name="FedSplitX",
            stage=always(Stage("train")),
            copies=SharedCopy(),
            aggregation=Merged(initial),
        )
    return Method(
        name="FedSplitX (paper's form)",
        stage=always(Stage("forward", trunk_epochs=local_epochs)),
        copies=CopyPerDevice(),
        aggregation=Separate(initial),
    )
