"""Which steps a bundle has."""

from __future__ import annotations

from export.steps import mixtures as mix_steps
from export.steps import returned as returned_steps
from export.steps.client_steps import ClientSteps, Step


def all_steps(steps: ClientSteps) -> list[Step]:
    """Every step of a tier's bundle."""
    found = [steps.predict(), steps.train(), steps.forward()]
    if steps.returned or steps.fused:
        found.append(returned_steps.activate(steps))
    if steps.returned:
        found.append(returned_steps.backward(steps))
    if steps.fused:
        found.append(returned_steps.fuse(steps))
    if steps.features:
        found.append(returned_steps.finish(steps))
    if steps.adversarial:
        found += [mix_steps.attack(steps), mix_steps.harden(steps)]
    return [*found, *(mix_steps.mix(steps, bases) for bases in mixed_at_once(steps.bases))]


def mixed_at_once(bases: int) -> list[int]:
    """Numbers of base networks that one graph mixes: powers of two, and all ``bases``.

    Other numbers are sums of these. Empty for 0 bases: a single model.
    """
    powers = [2**i for i in range(bases.bit_length()) if 2**i <= bases]
    return sorted({*powers, bases}) if bases else []
