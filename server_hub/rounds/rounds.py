"""The rounds as a state machine without I/O: members, what they owe, and when a round is over.

Time is a number of seconds that callers pass in; it only has to grow.
"""

from __future__ import annotations

import enum
import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

_LOST_GRACE, _LOST_GRACE_S = 0.2, 0.5
"""Grace of a member without a connection: a part of the round so far, and at least some seconds.

A device that has lost its connection is back within a second or so. One that was killed is not, and
a round that waited for it any longer would be more than 1.2 times as long as an undisturbed one.
"""

_STRIKES = 3
"""Rounds in a row that a device misses until it is drawn half as often."""

_RAREST = 8
"""A device that misses every round is drawn in one of so many rounds."""

DIVERGED_ROUNDS = 5
"""Rounds in a row in which training diverges, on every member or on the trunk, that end a job."""

_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
"""Shortest time between the starts of two rounds after one without any update. It doubles."""


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
        quorum: fraction of the members, rounded up, that ends a round without the slowest: the
            grace begins when their updates are in. 1 waits for all members until the deadline. A
            member without a connection is not waited for either once the quorum, or every other
            member, has delivered.
        grace: length of the grace, as a multiple of the time that the quorum took.
        grace_s: shortest grace, in seconds.
    """

    count: int = 20
    min_devices: int = 1
    per_round: int | None = None
    deadline_s: float = 300.0
    seed: int = 0
    patience: int | None = None
    quorum: float = 0.8
    grace: float = 1.0
    grace_s: float = 10.0

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
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum is {self.quorum}, must be above 0 and at most 1")
        if not self.grace >= 0:
            raise ValueError(f"grace is {self.grace}, must be 0 or more")
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s is {self.grace_s}, must be 0 or more")


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
        arrivals: by member whose update has arrived, when it has, in seconds since the start.
        dropped: by member that will not deliver, the reason.
        began: when the round has started.
        deadline: when the round ends at the latest.
        fruitless: number of rounds in a row that no device has delivered for.
        not_before: when the next round starts at the earliest.
        lost: by device that has a session and no connection, since when.
        missed: by device, the number of rounds in a row that it took part in and did not deliver
            for. A round that a device has declined is not counted.
        diverging: number of rounds in a row in which training has diverged on every member.
    """

    rules: RoundRules
    phase: Phase = Phase.WAITING
    number: int = 0
    completed: int = 0
    ready: dict[str, None] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    owed: set[str] = field(default_factory=set)
    arrivals: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    began: float = 0.0
    deadline: float = 0.0
    fruitless: int = 0
    not_before: float = -math.inf
    lost: dict[str, float] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    diverging: int = 0
    _declined: set[str] = field(default_factory=set)
    _diverged: set[str] = field(default_factory=set)
    _proven: set[str] = field(default_factory=set)  # devices that have delivered in this job
    _hopeless: set[str] = field(default_factory=set)  # devices of the rounds in ``diverging``

    @property
    def delivered(self) -> set[str]:
        """Members whose update has arrived."""
        return set(self.arrivals)

    def join(self, device: str) -> None:
        """A device has its bundle, and can be picked."""
        if device not in self.ready:
            self.not_before = -math.inf  # it may deliver where the others did not
        self.ready[device] = None

    def leave(self, device: str, reason: str) -> None:
        """A device has gone, for now or for good.

        What it owes is written off. What it has delivered counts.
        """
        self.ready.pop(device, None)
        self.lost.pop(device, None)
        if device in self.owed:
            self.drop(device, reason)

    def connection(self, device: str, lost_at: float | None) -> None:
        """The connection of a device has broken at a time, or (None) is there again."""
        if lost_at is None:
            self.lost.pop(device, None)
        else:
            self.lost[device] = lost_at

    def drop(self, device: str, reason: str) -> None:
        """A member will not deliver in this round, or what it has delivered does not count."""
        if device in self.members and self.phase is Phase.TRAINING:
            self.owed.discard(device)
            self.arrivals.pop(device, None)
            self.dropped[device] = reason

    def decline(self, device: str, reason: str, diverged: bool = False) -> None:
        """A member does not take part in this round, perhaps as its training has diverged."""
        if device in self.owed:
            self._declined.add(device)
            if diverged:
                self._diverged.add(device)
            self.drop(device, f"declined: {reason}")

    def deliver(self, device: str, now: float) -> None:
        """A member's update is complete and valid at time ``now``."""
        if device in self.owed:
            self.owed.remove(device)
            self.arrivals[device] = now - self.began

    def expects(self, device: str, number: int) -> bool:
        """Whether activations or an update of a device for round ``number`` are welcome."""
        return self.phase is Phase.TRAINING and number == self.number and device in self.owed

    def can_start(self, now: float) -> bool:
        """Whether enough devices are ready for the next round, and the pause before it is over."""
        enough = len(self.ready) >= self.rules.min_devices
        return self.phase is Phase.WAITING and enough and now >= self.not_before

    def draw(self) -> list[str]:
        """The devices that the rules pick for the next round: a draw of those that are ready.

        A device that has missed three rounds in a row takes part in the draw of every second round
        only, after three more of every fourth, then of every eighth, until it delivers.
        """
        pool = [device for device in self.ready if not self._rests(device)] or list(self.ready)
        wanted = self.rules.per_round
        if wanted is None or wanted >= len(pool):
            return pool
        rng = random.Random(f"{self.rules.seed}/{self.number + 1}")
        return rng.sample(sorted(pool), wanted)

    def _rests(self, device: str) -> bool:
        """Whether a device is left out of the next draw."""
        every = min(1 << self.missed.get(device, 0) // _STRIKES, _RAREST)
        # devices that miss the same rounds do not all come back in the same round
        shift = zlib.crc32(f"{self.rules.seed}/{device}".encode())
        return (self.number + 1 + shift) % every > 0

    def start(self, now: float, members: Iterable[str]) -> None:
        """Begin the next round.

        Args:
            now: the present time.
            members: devices that take part; those that are not ready any more do not.
        """
        assert self.can_start(now)
        self.number += 1
        self.phase = Phase.TRAINING
        self.members = {device for device in members if device in self.ready}
        self.owed = set(self.members)
        self.arrivals = {}
        self.dropped = {}
        self._declined = set()
        self._diverged = set()
        self.began, self.deadline = now, now + self.rules.deadline_s

    @property
    def diverged(self) -> bool:
        """Whether training has diverged on every member for too many rounds in a row.

        Devices that have delivered before must be among them: a few devices that say so cannot end
        a job that goes well on others.
        """
        return self.diverging >= DIVERGED_ROUNDS and self._proven <= self._hopeless

    @property
    def given_up(self) -> bool:
        """Whether no device has delivered for too many rounds in a row."""
        return self.rules.patience is not None and self.fruitless >= self.rules.patience

    @property
    def end(self) -> float:
        """When the round in progress ends if nothing more happens."""
        if not self.owed:
            return -math.inf
        end = self.deadline
        if self.rules.quorum == 1:
            return end
        members = len(self.owed) + len(self.arrivals)
        quorum = math.ceil(self.rules.quorum * members - 1e-9)
        took = sorted(self.arrivals.values())
        if len(took) >= quorum:
            reached = took[quorum - 1]
            end = min(end, self.began + reached + self._grace(reached))
        quorum = max(min(quorum, members - 1), 1)
        if len(took) >= quorum and self.owed <= self.lost.keys():
            end = min(end, max(self._written_off(device, took[quorum - 1]) for device in self.owed))
        return end

    def _grace(self, took: float) -> float:
        """Seconds that the others have after a quorum that took ``took`` seconds."""
        return max(self.rules.grace_s, self.rules.grace * took)

    def _written_off(self, device: str, took: float) -> float:
        """When a member without a connection is not waited for any more.

        Args:
            device: the member.
            took: seconds that the quorum took.
        """
        lost = self.lost[device]
        return lost + max(_LOST_GRACE_S, _LOST_GRACE * max(took, lost - self.began))

    def is_over(self, now: float) -> bool:
        """Whether the round in progress has come to its :attr:`end`."""
        return self.phase is Phase.TRAINING and now >= self.end

    def close(self, now: float) -> None:
        """Take nothing more in this round: what is still owed is written off."""
        for device in sorted(self.owed):
            self.drop(device, self._reason(device, now))

    def _reason(self, device: str, now: float) -> str:
        if now >= self.deadline:
            return f"no update within {self.rules.deadline_s:g} s"
        if device in self.lost:
            return "it has lost its connection"
        return (
            f"no update within {now - self.began:.3g} s, "
            f"in which {len(self.arrivals)} of {len(self.members)} devices have delivered"
        )

    def finish(self) -> bool:
        """End a closed round; False if no device has delivered, so that it does not count."""
        assert self.phase is Phase.TRAINING
        assert not self.owed
        for device in self.members:
            if device in self.arrivals:
                self.missed.pop(device, None)
            elif device not in self._declined:
                self.missed[device] = self.missed.get(device, 0) + 1
        useful = bool(self.arrivals)
        self._proven.update(self.arrivals)
        if self.members and self._diverged == self.members:
            self.diverging += 1
            self._hopeless |= self._diverged
        else:
            self.diverging, self._hopeless = 0, set()
        self.completed += useful
        self.fruitless = 0 if useful else self.fruitless + 1
        if self.fruitless:
            doublings = min(self.fruitless - 1, 10)
            self.not_before = self.began + min(_PAUSE_S * 2**doublings, _LONGEST_PAUSE_S)
        self.phase = Phase.DONE if self.completed >= self.rules.count else Phase.WAITING
        return useful
