"""Where each device is cut, and when that changes.

A policy looks at what the hub has seen of the devices in a round and says which of them should go
on with another cut. What a device can carry is a hard limit: the options that a policy is given
hold nothing beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple, Protocol

PolicyName = Literal["fixed", "latency", "adaptive"]

TOLERANCE = 0.1
"""How much longer than the slowest a round may take: times that are measured are never the same."""


@dataclass(frozen=True)
class Seen:
    """A device in the last round.

    Attributes:
        cut: its cut layer.
        options: the cuts that it can carry, its present one among them, shallowest first.
        compute_s: seconds that it has computed in the round; None if it has not said.
        loss: mean loss of the trunk on what it has sent; None if it has sent nothing.
        wait_s: seconds of the round in which it has not computed: transfers, and what it has
            waited for.
    """

    cut: int
    options: Sequence[int]
    compute_s: float | None
    loss: float | None
    wait_s: float = 0.0

    def time_at(self, cut: int) -> float | None:
        """Seconds for a round at another cut: blocks take about the same time each."""
        return None if self.compute_s is None else self.wait_s + self.compute_s * cut / self.cut

    def within(self, seconds: float) -> int:
        """The deepest option that takes no longer than this, or the shallowest there is."""
        fitting = [cut for cut in self.options if (self.time_at(cut) or 0.0) <= seconds]
        return max(fitting, default=min(self.options))


class Target(NamedTuple):
    """The cut that a device should have, and why."""

    cut: int
    reason: str


@dataclass(frozen=True)
class CutMove:
    """A device goes on with another cut."""

    device: str
    cut: int
    to: int
    reason: str


class CutPolicy(Protocol):
    """Says after a round which devices should have another cut."""

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        """The cuts that devices should have.

        Args:
            fleet: devices by name.
            busy: share of the round in which the trunk has computed.

        Returns:
            By device; those that are not named, or named with the cut they have, stay.
        """

    def state(self) -> dict[str, Any]:
        """What it keeps from round to round, for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        return


class Fixed(CutPolicy):
    """Every device keeps the cut of its tier."""

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        return {}


class Latency(CutPolicy):
    """All devices take the time that the slowest takes at its shallowest cut.

    A round is as long as its slowest device, so that is the shortest there can be; the others go
    as deep as that time allows, which takes work from the hub.
    """

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        times = [seen.time_at(min(seen.options)) for seen in fleet.values()]
        bound = max((t for t in times if t is not None), default=None)
        if bound is None:
            return {}
        bound *= 1 + TOLERANCE
        return {
            device: Target(
                cut := seen.within(bound),
                f"a round takes it {seen.time_at(seen.cut):.3g} s at cut {seen.cut}; "
                f"{seen.time_at(cut):.3g} s fit into {bound:.3g} s",
            )
            for device, seen in fleet.items()
            if seen.compute_s is not None
        }


@dataclass
class Adaptive(CutPolicy):
    """SplitFT's cut adaptation (https://arxiv.org/abs/2604.26388), reconstructed by us.

    Devices that do better than the mean get more layers, those that do worse fewer, within what
    their resources allow. Resources are a hard limit, the target of :class:`Latency`; progress is
    a nudge of one option below it::

        w_i <- w_i (1 + gamma (p_i - mean p)),   1/2 <= w_i <= 3/2
        cut_i = the limit, or the option below it where w_i < behind * mean w

    with ``p_i = exp(-loss_i)``, the inverse of the perplexity, relative to the best. Nobody goes
    deeper while the hub has time to spare: that would make no round shorter, and blocks that are
    averaged over devices learn more slowly than those that the trunk trains on everybody's
    batches. A device moves once its target has been the same for ``patience`` rounds, because
    every move means to load other graphs.

    Attributes:
        full: share of a round that the trunk computes from which on it has no time to spare.
        gamma: how strongly progress counts.
        behind: share of the mean weight below which a device is given less to do.
        patience: rounds that a target must stand.
    """

    full: float = 0.8
    gamma: float = 0.5
    behind: float = 0.75
    patience: int = 2
    _weights: dict[str, float] = field(default_factory=dict)
    _wanted: dict[str, tuple[int, int]] = field(default_factory=dict)

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        progress = self._progress(fleet)
        mean_progress = fmean(progress.values()) if progress else 0.0
        for device, p in progress.items():
            weight = self._weights.get(device, 1.0) * (1 + self.gamma * (p - mean_progress))
            self._weights[device] = min(max(weight, 0.5), 1.5)
        mean = fmean(self._weights.get(device, 1.0) for device in fleet) if fleet else 1.0
        moves = {}
        for device, limit in Latency().targets(fleet, busy).items():
            seen, share = fleet[device], self._weights.get(device, 1.0) / mean
            most = limit.cut if busy >= self.full else min(limit.cut, seen.cut)
            allowed = [cut for cut in seen.options if cut <= most]
            cut = allowed[-2] if share < self.behind and len(allowed) > 1 else allowed[-1]
            before, times = self._wanted.get(device, (cut, 0))
            times = times + 1 if cut == before else 1
            self._wanted[device] = cut, times
            if cut != seen.cut and times >= self.patience:
                reason = (
                    f"{limit.reason}; its weight is {share:.2f} of the mean, the hub computes "
                    f"{busy:.0%} of a round"
                )
                moves[device] = Target(cut, reason)
        return moves

    def state(self) -> dict[str, Any]:
        return {"weights": dict(self._weights), "wanted": dict(self._wanted)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._weights = dict(state["weights"])
        self._wanted = {device: (cut, times) for device, (cut, times) in state["wanted"].items()}

    @staticmethod
    def _progress(fleet: Mapping[str, Seen]) -> dict[str, float]:
        """``exp(-loss)`` of each device, relative to the largest."""
        losses = {d: seen.loss for d, seen in fleet.items() if seen.loss is not None}
        best = min(losses.values(), default=0.0)
        return {d: math.exp(best - loss) for d, loss in losses.items()}


def policy_of(name: PolicyName) -> CutPolicy:
    """The policy called so."""
    policies: dict[PolicyName, CutPolicy] = {
        "fixed": Fixed(), "latency": Latency(), "adaptive": Adaptive(),
    }  # fmt: skip
    return policies[name]


@dataclass(frozen=True)
class Cuts:
    """How devices get other cuts during a job; see :mod:`server_hub.rounds.cut_policy`.

    A device may move between the bundles for its runtime, codec and precision.

    Attributes:
        policy: ``fixed``, ``latency`` or ``adaptive``.
        wait_s: how long a round waits for devices that load another bundle.
        memory_mb: what training takes, by tier; a device that says how much it has gets no tier
            that takes more.
    """

    policy: PolicyName = "fixed"
    wait_s: float = 60.0
    memory_mb: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.wait_s <= 0:
            raise ValueError(f"wait_s is {self.wait_s}, must be above 0")
