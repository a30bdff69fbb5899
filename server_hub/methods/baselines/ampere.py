"""Ampere (arXiv 2507.07130): the devices' side first, then one upload for the server's side.

One cut for all, that of the poorest tier, with one auxiliary head. In all rounds but the last the
devices train alone and are averaged. In the last, every device sends the activations of its
examples once, without training, and the trunk trains on all of them pooled, for as many epochs as
the rounds before have made over the data.
"""

from __future__ import annotations

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut
from server_hub.methods.method import Method, SharedCopy, Stage


def ampere(initial: State, outline: JobOutline) -> Method:
    """Local rounds, then one upload and many epochs on the trunk."""
    epochs = max(1, round(outline.rounds * outline.local_epochs * outline.share))

    def stage(number: int, count: int) -> Stage:
        if number < count:
            return Stage(ActivationMode.NONE)
        return Stage(
            ActivationMode.FORWARD, local_epochs=0, trunk_epochs=epochs, everyone=True, anneal=True
        )

    return Method(name="Ampere", stage=stage, copies=SharedCopy(), aggregation=Merged(initial))


AMPERE = Recipe("Ampere (one upload)", ampere, at_poorest_cut)
