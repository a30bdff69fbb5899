"""What a device sends of a batch, and what the trunk trains on: activations, or a gradient."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edge_sdk.protocol import checks
from edge_sdk.protocol.checks import MAX_BASES, checked
from edge_sdk.protocol.tensors import Array


@dataclass(frozen=True)
class Batch:
    """Packed activations of some rows, from the device's learner to the trunk's step.

    Attributes:
        parts: the packed tensors by name, as the manifest's ``packed`` lists them.
        labels: (rows,) int64; (rows, positions) for a model of tokens, where -1 does not count.
            None in rounds in which labels stay on the device.
        base: number of the base network that the activations belong to; 0 for a single model.
        noise: whether they are those of adversarial examples, through the noise norms.
        present: class mask (classes,) float32: 1 for classes that the device has examples of, 0 for
            those that its loss leaves out; None where all classes count.
    """

    parts: dict[str, Array] = checked(checks.tensors)
    labels: Array | None = checked(checks.optional(checks.tensor), None)
    base: int = checked(checks.integer(0, MAX_BASES - 1), 0)
    noise: bool = checked(checks.flag, False)
    present: Array | None = checked(checks.optional(checks.tensor), None)

    @classmethod
    def of(cls, message: Batch) -> Batch:
        """The batch without what else a message says."""
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class HeadGradient:
    """Gradient of a batch's features, from a device that holds the model's head and the labels.

    Attributes:
        parts: packed gradient of the mean loss with respect to the features, by name.
        labels: number of labels that the mean loss is over.
    """

    parts: dict[str, Array] = checked(checks.tensors)
    labels: int = checked(checks.integer(1))

    @classmethod
    def of(cls, message: HeadGradient) -> HeadGradient:
        """The gradient without what else a message says."""
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})
