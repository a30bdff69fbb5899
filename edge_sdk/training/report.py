"""What a device says about its training."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoundReport:
    """One round of local training.

    Attributes:
        round: number of the round.
        loss: mean loss of the auxiliary heads in the last epoch; None if they were not trained.
        accuracy: their accuracy, a fraction; None likewise.
        seconds: time from the ``round`` message to the sent update.
        samples: number of rows that it was trained on.
    """

    round: int
    loss: float | None
    accuracy: float | None
    seconds: float
    samples: int


@dataclass
class TrainReport:
    """What :meth:`Device.train` did.

    Attributes:
        reason: why the hub stopped.
        rounds: the rounds that the device has trained in.
    """

    reason: str = ""
    rounds: list[RoundReport] = field(default_factory=list)
