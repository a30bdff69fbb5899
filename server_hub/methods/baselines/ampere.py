"""Ampere (arXiv 2507.07130): client segments first, then one upload of activations for the trunk.

All tiers have the cut of the poorest tier and one auxiliary head. In all rounds but the last the
devices train their segments alone, and the segments are averaged. In the last round every device
sends the activations of its examples once, without training. The trunk trains on all of them
pooled, for as many epochs as the job's rounds make over the data.
"""

from __future__ import annotations

from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from server_hub.aggregation.merged import Merged
from server_hub.methods.fleet import JobOutline, Recipe, at_poorest_cut
from server_hub.methods.method import Method, SharedCopy, Stage


def ampere(initial: State, outline: JobOutline) -> Method:
    """Compose Ampere; the arguments are those of :attr:`Recipe.compose`."""
    epochs = max(1, round(outline.rounds * outline.local_epochs * outline.share))

    def stage(number: int, count: int) -> Stage:
        if number < count:
            return Stage(ActivationMode.NONE)
        return Stage(
            ActivationMode.FORWARD, local_epochs=0, trunk_epochs=epochs, everyone=True, anneal=True
        )

    return Method(name="Ampere", stage=stage, copies=SharedCopy(), aggregation=Merged(initial))


AMPERE = Recipe("Ampere (one upload)", ampere, at_poorest_cut)
