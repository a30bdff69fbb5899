"""Examples made hard: small changes of the inputs that raise the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent within a maximum norm (https://arxiv.org/abs/1706.06083).

    Attributes:
        epsilon: how far a number may be from where it was.
        rate: how far it goes in a step.
        steps: how many there are; the first starts from a random point.
        low: least that an input can be.
        high: most.
    """

    epsilon: float = 8 / 255
    rate: float = 1.43 / 255
    steps: int = 7
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epsilon", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be 1 or more")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; low must be below high")

    def to_hyper(self) -> dict[str, float]:
        """As numbers by name, for a ``round`` message."""
        return {f"attack_{name}": float(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, hyper: Mapping[str, float]) -> Attack:
        """What :meth:`to_hyper` has given.

        Raises:
            ProtocolError: a number is missing, unknown or wrong.
        """
        own = {n.removeprefix("attack_"): v for n, v in hyper.items() if n.startswith("attack_")}
        wrong = own.keys() ^ {field.name for field in fields(cls)}
        if wrong:
            name = min(wrong)
            what = "has" if name in own else "lacks"
            raise ProtocolError("bad_message", f"hyper {what} attack_{name}", "hyper")
        try:
            return cls(**own | {"steps": int(own["steps"])})  # type: ignore[arg-type]
        except ValueError as error:
            raise ProtocolError("bad_message", f"hyper: attack_{error}", "hyper") from error

    def on(self, runtime: Runtime, batch: Mapping[str, Array], rng: np.random.Generator) -> Array:
        """Inputs that are hard for the present state, of the shape of ``x``.

        Args:
            runtime: runs the graph ``attack``.
            batch: ``x``, ``y`` and what else the graph takes of a batch.
            rng: of the starting point.
        """
        x = batch["x"]
        numbers = {n: np.asarray(getattr(self, n), np.float32) for n in _NUMBERS}
        start = x + rng.uniform(-self.epsilon, self.epsilon, x.shape).astype(x.dtype)
        hard: Array = start.clip(self.low, self.high)
        for _ in range(self.steps):
            hard = runtime.run("attack", {**batch, **numbers, "start": hard})["x_adv"]
        return hard


_NUMBERS = ("epsilon", "rate", "low", "high")
