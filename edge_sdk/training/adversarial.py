"""Adversarial examples: small changes of the inputs that raise the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime

_WIRE_NAMES = {
    "epsilon": "epsilon",
    "step_size": "rate",
    "steps": "steps",
    "low": "low",
    "high": "high",
}
"""Names of the fields in graphs, and after ``attack_`` in ``round.hyper``."""

MAX_STEPS = 1000
"""Largest number of steps of an attack; each takes a device as long as a training step."""


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent within a maximum norm (https://arxiv.org/abs/1706.06083).

    Attributes:
        epsilon: largest change of a number, in units of the inputs.
        step_size: how far a number moves in one step, in units of the inputs.
        steps: number of steps; the first starts from a random point.
        low: smallest value of an input.
        high: largest value of an input.

    Raises:
        ValueError: a number out of its range.
    """

    epsilon: float = 8 / 255
    step_size: float = 1.43 / 255
    steps: int = 7
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epsilon", "step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps is {self.steps}; it must be from 1 to {MAX_STEPS}")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be below high")

    def to_hyper(self) -> dict[str, float]:
        """The fields as numbers by their names in ``round.hyper``."""
        return {f"attack_{wire}": float(getattr(self, n)) for n, wire in _WIRE_NAMES.items()}

    @classmethod
    def of(cls, hyper: Mapping[str, float]) -> Attack:
        """The inverse of :meth:`to_hyper`; hyper-parameters of other names are left aside.

        Raises:
            ProtocolError: a number is missing, unknown or out of range.
        """
        given = {n.removeprefix("attack_"): v for n, v in hyper.items() if n.startswith("attack_")}
        wrong = given.keys() ^ set(_WIRE_NAMES.values())
        if wrong:
            name = min(wrong)
            what = "has" if name in given else "lacks"
            raise ProtocolError(ErrorCode.BAD_MESSAGE, f"hyper {what} attack_{name}", "hyper")
        fields = {name: given[wire] for name, wire in _WIRE_NAMES.items()}
        try:
            return cls(**fields | {"steps": int(given["steps"])})  # type: ignore[arg-type]
        except ValueError as error:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"hyper: attack: {error}", "hyper"
            ) from error

    def on(self, runtime: Runtime, batch: Mapping[str, Array], rng: np.random.Generator) -> Array:
        """Adversarial examples for the state that the runtime holds, shaped as ``x``.

        Args:
            runtime: runs the graph ``attack``.
            batch: ``x``, ``y`` and the graph's other inputs of a batch.
            rng: draws the starting point.
        """
        x = batch["x"]
        numbers = {
            wire: np.asarray(getattr(self, name), np.float32)
            for name, wire in _WIRE_NAMES.items()
            if name != "steps"
        }
        start = x + rng.uniform(-self.epsilon, self.epsilon, x.shape).astype(x.dtype)
        x_adv: Array = start.clip(self.low, self.high)
        for _ in range(self.steps):
            x_adv = runtime.run("attack", {**batch, **numbers, "start": x_adv})["x_adv"]
        return x_adv
