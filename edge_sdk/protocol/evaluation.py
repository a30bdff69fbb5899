"""The messages of the extension ``evaluation``: devices evaluate on what they keep back."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.protocol import checks
from edge_sdk.protocol.checks import checked
from edge_sdk.protocol.message import EVALUATION, Message


@dataclass(frozen=True)
class Evaluate(Message):
    """Asks the device to evaluate the model on what it keeps back; it answers ``evaluated``.

    Attributes:
        number: number of the round that made the model; later evaluations have larger numbers.
        paths: the ways to answer to evaluate: ``device_alone``, ``through_hub``, ``ensemble``; of
            base networks ``mix``.
        within_s: seconds after which the hub does not wait for the answer any more.
        state: sha256 of the state to evaluate; None if ``bases`` takes its place.
        bases: sha256 of the state of each base network by number, best first; None for a single
            model.
    """

    TYPE = "evaluate"
    EXTENSION = EVALUATION
    number: int = checked(checks.integer(1))
    paths: list[str] = checked(checks.names)
    within_s: float = checked(checks.number)
    state: str | None = checked(checks.optional(checks.sha256), None)
    bases: dict[str, str] | None = checked(checks.optional(checks.states), None)


@dataclass(frozen=True)
class Evaluated(Message):
    """How good the model is on what the device keeps back: answer to ``evaluate``.

    Attributes:
        number: the ``number`` of the ``evaluate``.
        labels: number of labels that were counted; 0 if nothing was evaluated.
        results: by way to answer, the accuracy, or for a model of tokens the mean cross-entropy;
            empty if nothing was evaluated.
    """

    TYPE = "evaluated"
    EXTENSION = EVALUATION
    number: int = checked(checks.integer(1))
    labels: int = checked(checks.integer())
    results: dict[str, float] = checked(checks.numbers)
