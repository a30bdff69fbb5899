"""Federated averaging (McMahan et al., AISTATS 2017) of models on devices, without a trunk.

In each round the devices train for some local epochs. Every layer becomes the mean of its copies,
weighted by samples. Three methods differ in the model that the devices hold:

- *EXC*: every device holds the model that fits the poorest tier.
- *FedAvg*: every device holds the whole model. It is an upper bound, for devices that could carry
  it.
- *Centralized*: one place holds the whole model and all data. A round takes as many samples there
  as the devices of the other methods have together.
"""

from __future__ import annotations

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut, whole_on_device
from server_hub.methods.method import Method, always


def fedavg(initial: State, outline: JobOutline) -> Method:
    """Compose federated averaging; the arguments are those of :attr:`Recipe.compose`."""
    return Method(
        name="FedAvg",
        stage=always(ActivationMode.NONE),
        aggregation=Merged(initial),
        paths=("device_alone",),
    )


EXC = Recipe("EXC (model of the poorest)", fedavg, at_poorest_cut)
FEDAVG = Recipe("FedAvg (whole model)", fedavg, whole_on_device, takes_whole=True)
CENTRALIZED = Recipe("Centralized", fedavg, whole_on_device, pooled=True)
