"""The families of steps by the names of their graphs, and which steps a bundle has."""

from __future__ import annotations

from collections.abc import Callable

from export.steps.adversarial import adversarial_train, attack
from export.steps.client_steps import ClientSteps
from export.steps.fused import fuse
from export.steps.mixtures import mix, mixed_at_once
from export.steps.predict import forward, predict
from export.steps.returned import activate, backward
from export.steps.step import Step
from export.steps.train import train
from export.steps.u_shaped import finish

OPTIONAL: dict[str, Callable[[ClientSteps], Step]] = {
    "activate": activate,
    "backward": backward,
    "fuse": fuse,
    "finish": finish,
    "attack": attack,
    "adversarial_train": adversarial_train,
}
"""The steps of :data:`export.steps.graph_names.NEEDS`."""


def all_steps(steps: ClientSteps) -> list[Step]:
    """Every step of a tier's bundle."""
    found = [predict(steps), train(steps), forward(steps)]
    found += [make(steps) for name, make in OPTIONAL.items() if name in steps.graphs]
    return [*found, *(mix(steps, bases) for bases in mixed_at_once(steps.bases))]
