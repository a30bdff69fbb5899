"""Which steps a bundle has."""

from __future__ import annotations

from export.steps.adversarial import adversarial_train, attack
from export.steps.client_steps import ClientSteps
from export.steps.fused import fuse
from export.steps.mixtures import mix, mixed_at_once
from export.steps.predict import forward, predict
from export.steps.returned import activate, backward
from export.steps.step import Step
from export.steps.train import train
from export.steps.u_shaped import finish


def all_steps(steps: ClientSteps) -> list[Step]:
    """Every step of a tier's bundle."""
    found = [predict(steps), train(steps), forward(steps)]
    if steps.returned or steps.fused:
        found.append(activate(steps))
    if steps.returned:
        found.append(backward(steps))
    if steps.fused:
        found.append(fuse(steps))
    if steps.features:
        found.append(finish(steps))
    if steps.adversarial:
        found += [attack(steps), adversarial_train(steps)]
    return [*found, *(mix(steps, bases) for bases in mixed_at_once(steps.bases))]
