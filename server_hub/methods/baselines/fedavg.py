"""Federated averaging (McMahan et al., AISTATS 2017) of models that lie on the devices alone.

Each round the devices train for some local epochs, and every layer becomes the mean of its copies,
weighted by samples. Three methods that differ in what is on the devices:

- *EXC*: one model that fits the poorest tier, which is what the poorest limits all to.
- *FedAvg*: the whole model on every device: an upper bound, for devices that could carry it.
- *Centralized*: the whole model where all data are; as many samples a round as the others' devices
  have together.
"""

from __future__ import annotations

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut, whole_on_device
from server_hub.methods.method import Method, always


def fedavg(initial: State, outline: JobOutline) -> Method:
    """Federated averaging: no activations, no trunk."""
    return Method(
        name="FedAvg",
        stage=always(ActivationMode.NONE),
        aggregation=Merged(initial),
        paths=("device_alone",),
    )


EXC = Recipe("EXC (model of the poorest)", fedavg, at_poorest_cut)
FEDAVG = Recipe("FedAvg (whole model)", fedavg, whole_on_device, takes_whole=True)
CENTRALIZED = Recipe("Centralized", fedavg, whole_on_device, pooled=True)
