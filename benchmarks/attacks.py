"""Attacks of devices on the model, for experiments: what they train on, send and claim."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.protocol.tensors import Array, State
from edge_sdk.runtime import Runtime
from edge_sdk.training.data import Examples
from server_hub.gateway.limits import Limits
from server_hub.methods.settings import MethodConfig
from server_hub.simulation.devices import Behave, Load

Change = Callable[[State, State, np.random.Generator], State]
"""Returns the tensors that an attacker sends, given those that it started from and has trained."""


@dataclass(frozen=True)
class Attack:
    """What an attacking device does.

    Attributes:
        change: changes its update.
        flips: whether it trains on label ``classes - 1 - y`` instead of ``y``.
        claims: number of examples that it says it has; None for the true number.
        gain: factor of its activations.
    """

    change: Change = lambda start, end, rng: end
    flips: bool = False
    claims: int | None = None
    gain: float = 1.0


def scaled(factor: float) -> Change:
    """Return an attack that multiplies the change of every tensor."""

    def change(start: State, end: State, rng: np.random.Generator) -> State:
        return {n: (start[n] + factor * (end[n] - start[n])).astype(np.float32) for n in end}

    return change


def _noise(start: State, end: State, rng: np.random.Generator) -> State:
    return {n: t + rng.standard_normal(t.shape).astype(np.float32) for n, t in end.items()}


def _zero(start: State, end: State, rng: np.random.Generator) -> State:
    return {n: np.zeros_like(t) for n, t in end.items()}


ATTACKS: dict[str, Attack] = {
    "scale 10": Attack(scaled(10)),
    "scale 100": Attack(scaled(100)),
    "scale -10": Attack(scaled(-10)),
    "scale 1e6": Attack(scaled(1e6)),
    "noise": Attack(_noise),
    "zero": Attack(_zero),
    "flip": Attack(flips=True),
    "claim": Attack(claims=Limits.samples),
    "claim and flip": Attack(flips=True, claims=Limits.samples),
    "activations 1e4": Attack(gain=1e4),
    # its own distances are about the median: it goes as far as the bound lets it
    "below the clip": Attack(scaled(-0.95 * MethodConfig.clip), flips=True),
}
"""Attacks by name."""


class _Claiming(Examples):
    """Examples whose number is a lie; training takes them as they are."""

    claims = 0

    def __len__(self) -> int:
        return self.claims

    def fitted(self, manifest: Manifest) -> Examples:
        fitted = super().fitted(manifest)
        return _claiming(fitted.x, fitted.y, self.claims)

    def batches(self, size: int, rng: np.random.Generator | None = None):  # type: ignore[no-untyped-def]
        return Examples(self.x, self.y).batches(size, rng)


def _claiming(x: Array, y: Array, claims: int) -> Examples:
    examples = _Claiming(x, y)
    object.__setattr__(examples, "claims", claims)
    return examples


class AttackingRuntime:
    """Implements :class:`edge_sdk.runtime.Runtime` with another runtime, and lies.

    Args:
        runtime: trains as it should.
        attack: changes what is sent.
        packed: names of the packed activations.
    """

    def __init__(self, runtime: Runtime, attack: Attack, packed: Collection[str]) -> None:
        self._runtime, self._attack, self._packed = runtime, attack, packed
        self._start: State = {}
        self._rng = np.random.default_rng(0)

    @property
    def loading_s(self) -> float:
        """Seconds spent on loading graphs so far."""
        return self._runtime.loading_s

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        self._start = {n: np.array(t) for n, t in tensors.items()}
        self._runtime.set_state(tensors)

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        end = self._runtime.get_state(slots)
        return self._attack.change(self._start, end, self._rng)

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self._runtime.run(graph, batch)
        if self._attack.gain == 1.0:
            return outputs
        return {
            n: (t * self._attack.gain).astype(t.dtype)
            if n in self._packed and t.dtype.kind == "f" else t
            for n, t in outputs.items()
        }  # fmt: skip


def behave(attack: Attack, attackers: Collection[str], classes: int) -> Behave:
    """Return how the devices of a fleet behave, for :class:`Simulation`.

    Args:
        attack: what attackers do.
        attackers: names of the attacking devices.
        classes: number of classes.
    """

    def change(device: str, data: Examples, load: Load) -> tuple[Examples, Load]:
        if device not in attackers:
            return data, load
        if attack.flips:
            data = replace(data, y=classes - 1 - data.y)
        if attack.claims is not None:
            data = _claiming(data.x, data.y, attack.claims)

        def lying(bundle: Bundle, threads: int) -> Runtime:
            packed = {spec.name for spec in bundle.manifest.packed}
            return AttackingRuntime(load(bundle, threads), attack, packed)

        return data, lying

    return change
