"""What local training takes, yields and returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import Features, Gradient
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples

Augment = Callable[[Examples, np.random.Generator], Examples]
"""Changes the rows of a batch before a training step.

It takes rows in the dtypes and shapes of the model and returns such rows, and it draws from the
generator only, so that a round can be repeated.
"""


@dataclass(frozen=True)
class LocalPlan:
    """How to train in one round.

    Attributes:
        epochs: passes over the local examples.
        batch_size: rows of a batch; the last one of an epoch may have fewer.
        hyper: hyper-parameters by name, as in the ``round`` message.
        activations: when activations are sent, and what comes back for them.
        seed: seed of the order of the examples, of dropout, of adversarial examples and of
            augmentation.
        staleness: with returned gradients, how many further batches may be in flight while the
            learner waits for a gradient.
        augment: changes every batch that is trained on; None for no augmentation.
    """

    epochs: int
    batch_size: int
    hyper: Mapping[str, float]
    activations: ActivationMode
    seed: int
    staleness: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "activations", ActivationMode(self.activations))


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        state: the trained tensors by name, the same names that training started from; those of
            several base networks are named by :func:`edge_sdk.bundle.manifest.tensor_of`.
        samples: number of local examples.
        metrics: ``loss`` and ``accuracy`` of the heads in the last epoch, measured before each
            step, means over the labels that count. Empty if the heads were not trained.
    """

    state: dict[str, Array]
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Outgoing:
    """What the learner hands over for the hub.

    Attributes:
        number: number of the batch in its round, from 0 on.
        batch: packed activations with their labels; or the gradient of the batch's features.
    """

    number: int
    batch: Batch | HeadGradient


@dataclass(frozen=True)
class ReplyRequest:
    """What the learner needs from the hub for a batch that it has handed over.

    Attributes:
        number: number of the batch in its round.
        wait: whether the learner cannot go on without it; else None may be sent into the learner.
        features: whether it needs the batch's features, not the gradient of its activations.
    """

    number: int
    wait: bool
    features: bool = False


class NoGradient(NamedTuple):
    """The answer to a :class:`ReplyRequest` for a gradient that will never come."""


Reply = Gradient | Features | NoGradient | None
"""What is sent into the learner: the reply to a :class:`ReplyRequest`, or None for none yet."""


TrainingStep = Outgoing | ReplyRequest | None
"""What the learner yields after some computing; None asks for nothing."""


Training = Generator[TrainingStep, Reply, LocalResult]
"""Local training, a step at a time; returns the result.

After a :class:`ReplyRequest` it takes the reply; :class:`NoGradient` only with ``"fused"``, where
the heads train alone then. After anything else it takes None.
"""


def advance(training: Training, reply: Reply = None) -> TrainingStep | LocalResult:
    """Compute up to the next yield of local training, or to its end.

    Args:
        training: what :meth:`Learner.training` returned.
        reply: the reply to the :class:`ReplyRequest` that it yielded last, if it was one.
    """
    try:
        return training.send(reply)
    except StopIteration as end:
        result: LocalResult = end.value
        return result
