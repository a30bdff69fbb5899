"""The rounds as a state machine without I/O: members, what they owe, and when a round is over.

Time is a number of seconds that callers pass in; it only has to grow.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable
from dataclasses import dataclass, field


class Phase(enum.Enum):
    """State of the job."""

    WAITING = "waiting for devices"
    TRAINING = "round in progress"
    DONE = "all rounds done"


@dataclass(frozen=True)
class RoundRules:
    """When rounds start and end: the table ``[rounds]`` of ``hub.toml``.

    Attributes:
        count: number of rounds of the job.
        min_devices: number of ready devices that a round needs to start.
        per_round: number of devices that take part in a round, drawn at random; None for all.
        deadline_s: seconds after which a round ends without the updates that are missing.
        seed: seed of the draw.
        patience: number of rounds in a row that nobody delivers for, after which the job is given
            up; None to go on for ever.
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
        rules: when rounds start and end.
        phase: state of the job.
        number: number of the round in progress, or of the last one. No two rounds have the same.
        completed: number of rounds that a device has delivered for; the job is done when it is
            ``rules.count``.
        ready: devices that could take part in the next round, in the order in which they joined.
        members: devices that take part in this round.
        owed: members whose update is still expected.
        delivered: members whose update has arrived.
        dropped: by member that will not deliver, the reason.
        deadline: when the round ends at the latest.
        fruitless: number of rounds in a row that no device has delivered for.
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

    def join(self, device: str) -> None:
        """A device has its bundle, and can be picked."""
        self.ready[device] = None

    def leave(self, device: str, reason: str) -> None:
        """A device has gone, for now or for good.

        What it owes is written off. What it has delivered counts.
        """
        self.ready.pop(device, None)
        if device in self.owed:
            self.drop(device, reason)

    def drop(self, device: str, reason: str) -> None:
        """A member will not deliver in this round, or what it has delivered does not count."""
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
        """Whether activations or an update of a device for round ``number`` are welcome."""
        return self.phase is Phase.TRAINING and number == self.number and device in self.owed

    def can_start(self) -> bool:
        """Whether enough devices are ready for the next round."""
        return self.phase is Phase.WAITING and len(self.ready) >= self.rules.min_devices

    def draw(self) -> list[str]:
        """The devices that the rules pick for the next round: a draw of those that are ready."""
        pool = list(self.ready)
        wanted = self.rules.per_round
        if wanted is None or wanted >= len(pool):
            return pool
        rng = random.Random(f"{self.rules.seed}/{self.number + 1}")
        return rng.sample(sorted(pool), wanted)

    def start(self, now: float, members: Iterable[str]) -> None:
        """Begin the next round.

        Args:
            now: the present time.
            members: devices that take part; those that are not ready any more do not.
        """
        assert self.can_start()
        self.number += 1
        self.phase = Phase.TRAINING
        self.members = {device for device in members if device in self.ready}
        self.owed = set(self.members)
        self.delivered = set()
        self.dropped = {}
        self.deadline = now + self.rules.deadline_s

    @property
    def given_up(self) -> bool:
        """Whether no device has delivered for too many rounds in a row."""
        return self.rules.patience is not None and self.fruitless >= self.rules.patience

    def is_over(self, now: float) -> bool:
        """Whether every member has delivered or dropped out, or the deadline has passed."""
        return self.phase is Phase.TRAINING and (not self.owed or now >= self.deadline)

    def finish(self) -> bool:
        """End the round; False if no device has delivered, so that the round does not count."""
        assert self.phase is Phase.TRAINING
        for device in sorted(self.owed):
            self.drop(device, f"no update within {self.rules.deadline_s:g} s")
        useful = bool(self.delivered)
        self.completed += useful
        self.fruitless = 0 if useful else self.fruitless + 1
        self.owed = set()
        self.phase = Phase.DONE if self.completed >= self.rules.count else Phase.WAITING
        return useful
