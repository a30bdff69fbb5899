"""The round as a state machine without I/O: who takes part, what is owed, when it is over.

Time is a number that callers pass in, in seconds; it only has to grow.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field


class Phase(enum.Enum):
    """Where the job is."""

    WAITING = "waiting for devices"
    TRAINING = "round in progress"
    DONE = "all rounds done"


@dataclass(frozen=True)
class RoundRules:
    """When rounds start and end.

    Attributes:
        count: rounds of the job.
        min_devices: ready devices that a round needs to start.
        per_round: devices that take part in a round, drawn at random; None for all.
        deadline_s: after so long a round ends without the updates that are missing.
        seed: of the draw.
        patience: rounds in a row that nobody delivers for, until the job is given up; None to
            go on for ever.
    """

    count: int = 20
    min_devices: int = 1
    per_round: int | None = None
    deadline_s: float = 300.0
    seed: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}, must be at least 1")
        if self.min_devices < 1:
            raise ValueError(f"min_devices is {self.min_devices}, must be at least 1")
        if self.per_round is not None and self.per_round < 1:
            raise ValueError(f"per_round is {self.per_round}, must be at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}, must be at least 1")
        if self.deadline_s <= 0:
            raise ValueError(f"deadline_s is {self.deadline_s}, must be above 0")


@dataclass
class Rounds:
    """The rounds of one job.

    Attributes:
        number: the round in progress, or the last one that was. No two have the same.
        completed: rounds that somebody delivered for; the job is done when they are ``count``.
        ready: devices that could take part in the next round.
        members: devices that take part in this round.
        owed: members whose update is still expected.
        delivered: members whose update has come.
        dropped: members that will not deliver, with the reason.
    """

    rules: RoundRules
    phase: Phase = Phase.WAITING
    number: int = 0
    completed: int = 0
    ready: dict[str, None] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    owed: set[str] = field(default_factory=set)
    delivered: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)
    deadline: float = 0.0
    fruitless: int = 0
    """Rounds in a row that nobody has delivered for."""

    def join(self, device: str) -> None:
        """A device has its bundle and can be picked."""
        self.ready[device] = None

    def leave(self, device: str, reason: str) -> None:
        """A device has gone, for now or for good.

        What it owes is written off; what it has delivered counts.
        """
        self.ready.pop(device, None)
        if device in self.owed:
            self.drop(device, reason)

    def drop(self, device: str, reason: str) -> None:
        """A member will not deliver in this round, or what it delivered does not count."""
        if device in self.members and self.phase is Phase.TRAINING:
            self.owed.discard(device)
            self.delivered.discard(device)
            self.dropped[device] = reason

    def deliver(self, device: str) -> None:
        """A member's update is complete and valid."""
        if device in self.owed:
            self.owed.remove(device)
            self.delivered.add(device)

    def expects(self, device: str, number: int) -> bool:
        """Whether activations or an update of this device for round ``number`` are welcome."""
        return self.phase is Phase.TRAINING and number == self.number and device in self.owed

    def can_start(self) -> bool:
        """Whether enough devices are ready for the next round."""
        return self.phase is Phase.WAITING and len(self.ready) >= self.rules.min_devices

    def start(self, now: float, everyone: bool = False) -> list[str]:
        """Begin the next round; returns its members: a draw of those ready, or ``everyone``."""
        assert self.can_start()
        pool = list(self.ready)
        wanted = self.rules.per_round
        if wanted is not None and wanted < len(pool) and not everyone:
            pool = random.Random(f"{self.rules.seed}/{self.number + 1}").sample(
                sorted(pool), wanted
            )
        self.number += 1
        self.phase = Phase.TRAINING
        self.members = set(pool)
        self.owed = set(pool)
        self.delivered = set()
        self.dropped = {}
        self.deadline = now + self.rules.deadline_s
        return pool

    @property
    def given_up(self) -> bool:
        """Whether nobody has delivered for too long."""
        return self.rules.patience is not None and self.fruitless >= self.rules.patience

    def is_over(self, now: float) -> bool:
        """Whether every member has delivered or dropped out, or the deadline has passed."""
        return self.phase is Phase.TRAINING and (not self.owed or now >= self.deadline)

    def finish(self) -> bool:
        """End the round; False if nobody delivered, so that it does not count."""
        assert self.phase is Phase.TRAINING
        for device in sorted(self.owed):
            self.drop(device, f"no update within {self.rules.deadline_s:g} s")
        useful = bool(self.delivered)
        self.completed += useful
        self.fruitless = 0 if useful else self.fruitless + 1
        self.owed = set()
        self.phase = Phase.DONE if self.completed >= self.rules.count else Phase.WAITING
        return useful
