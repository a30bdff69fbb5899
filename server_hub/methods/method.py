"""The parts that training methods are composed of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from server_hub.aggregation.interface import Aggregation
from server_hub.methods.base_assignment import BaseAssignment

# --- what crosses the cut -------------------------------------------------------------------------

ActivationMode = Literal["train", "forward", "returned", "u_shaped", "fused", "none"]
"""When a device sends activations: from its training steps, from a pass before training, never.

No gradient comes back in these: a device learns from its auxiliary heads alone. With ``returned``
it sends each batch, gets the gradient of its activations, and learns from that alone; with
``fused`` from both. With ``u_shaped`` labels stay on the device, and the model's head is there.
"""

RETURNING = ("returned", "u_shaped", "fused")
"""Those in which gradients come back."""


# --- copies of the trunk --------------------------------------------------------------------------


class ServerCopies(Protocol):
    """Which copy of the trunk a device's activations train."""

    def replica_of(self, device: str) -> str:
        """Name of the copy."""


class SharedCopy:
    """One trunk for all devices: their rows are merged into one batch."""

    def replica_of(self, device: str) -> str:
        return "shared"


class CopyPerDevice:
    """One trunk per device, all starting the round from the same weights."""

    def replica_of(self, device: str) -> str:
        return device


# --- aggregation ----------------------------------------------------------------------------------


# --- the composition ------------------------------------------------------------------------------

Path = Literal["device_alone", "through_hub", "ensemble", "mix"]
"""A way to answer: the device's own heads, the model's head on the hub, all heads together; or all
base networks, mixed."""

ALL_PATHS: tuple[Path, ...] = ("device_alone", "through_hub", "ensemble")
"""Those of a single model."""


@dataclass(frozen=True)
class Stage:
    """What happens in a round.

    Attributes:
        activations: what crosses the cut, and when.
        local_epochs: epochs on the devices; None for as many as are configured.
        trunk_epochs: passes of the trunk over the round's activations.
        everyone: all devices that are ready take part, not a draw of them.
        anneal: the trunk's learning rate goes from its full value to zero within the round.
    """

    activations: ActivationMode
    local_epochs: int | None = None
    trunk_epochs: int = 1
    everyone: bool = False
    anneal: bool = False


@dataclass(frozen=True)
class Method:
    """A training method as a composition of parts.

    Attributes:
        name: for reports.
        stage: what happens in round ``number`` of ``count``, from 1 on.
        copies: which copy of the trunk a device's activations train.
        aggregation: the global model and how it averages.
        paths: the ways to answer that it trains.
        merges: whether the trunk merges arrivals into one step; else each is a step of its own.
        keeps_slots: the optimizers' slots are averaged and handed on as the parameters are; else
            every round starts with fresh optimizers.
        mixing: how base networks are trained, where the model is split into some.
    """

    name: str
    stage: Callable[[int, int], Stage]
    copies: ServerCopies
    aggregation: Aggregation
    paths: tuple[Path, ...] = ALL_PATHS
    merges: bool = True
    keeps_slots: bool = False
    mixing: BaseAssignment | None = None


def always(stage: Stage) -> Callable[[int, int], Stage]:
    """The same in every round."""
    return lambda number, count: stage
