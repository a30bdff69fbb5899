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

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.aggregation.separate import Separate
from server_hub.methods.fleet import JobOutline, Recipe
from server_hub.methods.method import CopyPerDevice, Method, always


def fedsplitx(initial: State, outline: JobOutline) -> Method:
    """The merged form.

    Args:
        initial: tensors of the whole model by name.
        outline: outline of the job.
    """
    return Method(
        name="FedSplitX",
        stage=always(ActivationMode.TRAIN),
        aggregation=Merged(initial, outline.rule),
    )


def fedsplitx_paper(initial: State, outline: JobOutline) -> Method:
    """The paper's form, for reproduction; the arguments are those of :func:`fedsplitx`."""
    return Method(
        name="FedSplitX (paper's form)",
        stage=always(ActivationMode.FORWARD, trunk_epochs=outline.local_epochs),
        aggregation=Separate(initial),
        copies=CopyPerDevice(),
    )


FEDSPLITX = Recipe("FedSplitX", fedsplitx, takes_rule=True)
FEDSPLITX_PAPER = Recipe("FedSplitX (paper's form)", fedsplitx_paper)
