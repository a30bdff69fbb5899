"""Cut policies, which choose the cut layer of each device after a round.

A policy chooses from measurements of the last round. It chooses only among the cuts that the device
can carry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple, Protocol

PolicyName = Literal["fixed", "latency", "adaptive"]
"""Name of a cut policy."""

TOLERANCE = 0.1
"""Fraction by which a round may exceed the bound, because measured times vary."""


@dataclass(frozen=True)
class Seen:
    """Measurements of a device in the last round.

    Attributes:
        cut: cut layer of the device.
        options: cut layers that the device can carry, the present one included, shallowest first.
        compute_s: seconds that the device has computed; None if the device did not report them.
        loss: mean loss of the trunk on the device's activations; the device's own loss if it has
            sent none; None if neither is known.
        wait_s: seconds that the device has spent on transfers and on waiting.
    """

    cut: int
    options: Sequence[int]
    compute_s: float | None
    loss: float | None
    wait_s: float = 0.0

    def time_at(self, cut: int) -> float | None:
        """Return the estimated seconds of a round at the cut ``cut``; None if unknown.

        The estimate assumes that all blocks take the same time.
        """
        return None if self.compute_s is None else self.wait_s + self.compute_s * cut / self.cut

    def within(self, seconds: float) -> int:
        """Return the deepest option whose round fits into ``seconds``, or else the shallowest."""
        fitting = [cut for cut in self.options if (self.time_at(cut) or 0.0) <= seconds]
        return max(fitting, default=min(self.options))


class Target(NamedTuple):
    """The cut that a policy chooses for a device, and the reason for people to read."""

    cut: int
    reason: str


@dataclass(frozen=True)
class CutMove:
    """The move of a device to another cut.

    Attributes:
        device: name of the device.
        cut: present cut layer.
        to: new cut layer.
        reason: reason of the policy, for people to read.
    """

    device: str
    cut: int
    to: int
    reason: str


class CutPolicy(Protocol):
    """Chooses the cuts of devices after a round."""

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        """Choose the cuts of devices.

        Args:
            fleet: measurements by device name.
            busy: fraction of the round that the trunk spent in steps, from 0 to 1.

        Returns:
            Targets by device name. A device without a target keeps its cut.
        """

    def state(self) -> dict[str, Any]:
        """Return what the policy remembers between rounds, as JSON can hold it."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what the policy remembers to a value that :meth:`state` returned."""
        return


class Fixed(CutPolicy):
    """Every device keeps the cut of its tier."""

    def targets(self, fleet: Mapping[str, Seen], busy: float) -> dict[str, Target]:
        return {}


class Latency(CutPolicy):
    """Every device gets the deepest cut that does not make the round longer.

    The bound of a round is the time of the slowest device at its shallowest cut. No choice of cuts
    makes a shorter round. The other devices go as deep as the bound allows, which relieves the hub.
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
    """SplitFT's cut adaptation (https://arxiv.org/abs/2604.26388).

    This is a reconstruction from the paper. A device that makes more progress than
    the mean gets more blocks, and a device that makes less progress gets fewer. The target of
    :class:`Latency` is a hard limit. Little progress moves a device one option below it::

        w_i <- w_i (1 + gamma (p_i - mean p)),   1/2 <= w_i <= 3/2
        cut_i = the limit, or the option below it if w_i < behind * mean w

    with ``p_i = exp(-loss_i)``, the inverse of the perplexity, relative to the best. No device goes
    deeper while the hub has idle time. A deeper cut would not shorten the round then, and blocks
    that are averaged over devices learn more slowly than blocks that the trunk trains on the
    batches of all devices. A device moves after its target has been the same for ``patience``
    rounds, because it must load other graphs for every move.

    Attributes:
        full: fraction of a round in trunk steps above which the hub has no idle time.
        gamma: strength of the influence of progress on a weight.
        behind: fraction of the mean weight below which a device gets the option below its limit.
        patience: number of rounds in which a target must be the same.
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
        """Return ``exp(-loss)`` of each device relative to the largest, by device name."""
        losses = {d: seen.loss for d, seen in fleet.items() if seen.loss is not None}
        best = min(losses.values(), default=0.0)
        return {d: math.exp(best - loss) for d, loss in losses.items()}


def policy_of(name: PolicyName) -> CutPolicy:
    """Return a new policy with this name."""
    policies: dict[PolicyName, CutPolicy] = {
        "fixed": Fixed(), "latency": Latency(), "adaptive": Adaptive(),
    }  # fmt: skip
    return policies[name]


@dataclass(frozen=True)
class Cuts:
    """Cuts that move during a job: the table ``[cuts]`` of ``hub.toml``.

    A device may move between bundles with the same runtime, codec and precision.

    Attributes:
        policy: name of the policy: ``fixed``, ``latency`` or ``adaptive``.
        wait_s: seconds that the next round waits for devices that load another bundle.
        memory_mb: memory that training takes, in MB, by tier. A device that reports its memory gets
            no tier that takes more.
    """

    policy: PolicyName = "fixed"
    wait_s: float = 60.0
    memory_mb: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.wait_s <= 0:
            raise ValueError(f"wait_s is {self.wait_s}, must be above 0")
        for device, memory in self.memory_mb.items():
            if not memory > 0:
                raise ValueError(f"memory_mb of {device!r} is {memory}, must be above 0")
