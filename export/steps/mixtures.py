"""Graphs that mix base networks: ``mix_N``.

A client segment is one of several *base networks* of the same structure, which share one set of
graphs (Split-Mix, Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747). ``mix_N`` computes the
answer of N of them in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.vmapped import over_bases
from export.steps.client_steps import ClientSteps, packed_ports
from export.steps.eager import EagerSegment
from export.steps.predict import VERIFIED_ROBUSTNESS, evaluated
from export.steps.step import Step, Tensors


def mix(steps: ClientSteps, bases: int) -> Step:
    """``(states of some bases, x) -> logits, packed activations``, in one pass.

    Logits are the mean over the bases, (heads, batch, classes), or (heads, batch, positions,
    vocabulary). Activations are packed per base, (bases, ...), unless bases are whole on the
    device.

    Args:
        steps: steps of one base.
        bases: number of bases to mix; the tensors of their states are (bases, ...).
    """
    sent = () if steps.segment.whole else steps.packed

    def function(constants: Tensors, given: Tensors) -> Tensors:
        def one(own: Tensors) -> tuple[Tensor, ...]:
            h, logits = steps.call(False, {**constants, **own}, given["x"])
            parts = steps.pack(h)
            return logits, *(parts[spec.name] for spec in sent)

        with steps.robust(given):
            logits, *parts = over_bases(one, {n: given[f"bases/{n}"] for n in steps.initial})
        names = (f"bases.{spec.name}" for spec in sent)
        return {"logits": logits.mean(0), **dict(zip(names, parts, strict=True))}

    def reference(given: Tensors) -> Tensors:
        """The base networks run one after the other."""
        answers, packed = [], []
        for base in range(bases):
            own = given | {n: given[f"bases/{n}"][base] for n in steps.initial}
            eager = EagerSegment(steps, own)
            h, logits = evaluated(eager, own)
            answers.append(logits)
            packed.append(eager.unrounded(h))
        parts = {
            f"bases.{spec.name}": torch.stack([own[spec.name] for own in packed]) for spec in sent
        }
        return {"logits": torch.stack(answers).mean(0), **parts}

    inputs = [
        *(
            Port(TensorSpec(f"bases/{n}", "float32", (bases, *t.shape)), "bases")
            for n, t in steps.initial.items()
        ),
        Port(steps.x, "batch"),
        *steps.robustness_port(),
    ]
    each = [TensorSpec(s.name, s.dtype, (bases, *s.shape)) for s in sent]
    return steps.step(
        f"mix_{bases}",
        function,
        inputs,
        [steps.logits_port(), *packed_ports(each, "bases.")],
        reference,
        {"robustness": VERIFIED_ROBUSTNESS},
    )


def mixed_at_once(bases: int) -> list[int]:
    """Numbers of base networks that one graph mixes: powers of two, and all ``bases``.

    Other numbers are sums of these. Empty for 0 bases: a single model.
    """
    powers = [2**i for i in range(bases.bit_length()) if 2**i <= bases]
    return sorted({*powers, bases}) if bases else []
