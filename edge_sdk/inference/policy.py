"""How many base networks a device mixes for an answer, and how robust the answer is.

A device with Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747) holds several
narrow base networks. More of them give a better answer and take longer; ``robustness``, the paper's
lambda, trades accuracy on clean inputs for accuracy on noisy ones. Both can differ with every
answer, so a phone that runs low on charge goes on answering, only more cheaply.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk.errors import ConfigError

Thermal = Literal["nominal", "fair", "serious", "critical"]

_HEAT: dict[str, float] = {"nominal": 1, "fair": 1 / 2, "serious": 1 / 4, "critical": 0}
"""Fraction of the bases that a device may mix, by thermal level."""


@dataclass(frozen=True)
class Condition:
    """The state of the device at this moment, as an app knows it.

    ``thermal`` has the levels of iOS and macOS (``ProcessInfo.ThermalState``). Those of Android
    (``PowerManager.getCurrentThermalStatus``) map to them as in Chromium:

    ========  =======================================
    thermal   Android's ``THERMAL_STATUS_``
    ========  =======================================
    nominal   ``NONE``
    fair      ``LIGHT``, ``MODERATE``
    serious   ``SEVERE``
    critical  ``CRITICAL``, ``EMERGENCY``, ``SHUTDOWN``
    ========  =======================================

    Attributes:
        battery: fraction of the charge that is left, 0 to 1; None on mains, or if it is unknown.
        charging: whether the battery is being charged; ``battery`` then does not matter.
        thermal: thermal level of the device.
        latency_s: seconds that an answer may take; None for no limit.
        hostile: expected strength of noise or attacks, 0 to 1: rain on the lens, inputs from
            strangers.

    Raises:
        ConfigError: a value out of its range.
    """

    battery: float | None = None
    charging: bool = False
    thermal: Thermal = "nominal"
    latency_s: float | None = None
    hostile: float = 0.0

    def __post_init__(self) -> None:
        if self.battery is not None:
            _check_part("battery", self.battery)
        if self.thermal not in _HEAT:
            raise ConfigError(f"thermal must be one of {', '.join(_HEAT)}, not {self.thermal!r}")
        if self.latency_s is not None and not self.latency_s > 0:
            raise ConfigError(
                f"latency_s must be more than 0 seconds, not {self.latency_s}; "
                "leave it out where an answer may take any time"
            )
        _check_part("hostile", self.hostile)


@dataclass(frozen=True)
class Choice:
    """How to compute the next answer.

    Attributes:
        bases: how many base networks to mix, at least 1.
        robustness: weight of the noise norms, 0 to 1.
        reason: one sentence that says what decided.
    """

    bases: int
    robustness: float
    reason: str


class MixturePolicy:
    """Picks the number of bases and the robustness for a condition.

    Each row allows some of the bases, and the smallest number wins. Halves and quarters are rounded
    down, but 1 base is always allowed.

    ============================================  ===============================================
    condition                                     bases
    ============================================  ===============================================
    none of those below                           all
    thermal ``fair``                              half
    thermal ``serious``                           a quarter
    thermal ``critical``                          1
    not charging, battery below 0.5               half
    not charging, battery up to ``low_battery``   1
    ``latency_s``                                 the most, within the rows above, that take no
                                                  longer; 1 if none is in time, as the reason says
    ============================================  ===============================================

    ``robustness`` is ``hostile``. Where two rows allow the same number, the reason names the first
    of heat, battery and latency.

    Args:
        latencies: seconds that mixing n bases takes, by n, as measured on this device
            (:func:`measure_latencies`). The largest n is the number of bases, and 1 must be
            included. Times in between are interpolated linearly, which is too low for numbers that
            :meth:`edge_sdk.inference.mixture.Mixture.answer` computes in several calls: measure
            those as well.
        low_battery: fraction of the charge at which a device mixes a single base, 0 to 1.

    Raises:
        ConfigError: no latencies, none for 1 base, one that is no positive number, or
            ``low_battery`` outside 0 to 1.
    """

    def __init__(self, latencies: Mapping[int, float], *, low_battery: float = 0.2) -> None:
        if not latencies:
            raise ConfigError("latencies are empty; measure_latencies measures them on this device")
        for n, seconds in latencies.items():
            _check_bases(n)
            if not 0 < seconds < math.inf:
                raise ConfigError(
                    f"latencies[{n}] must be a positive number of seconds, not {seconds}"
                )
        if 1 not in latencies:
            raise ConfigError(
                "latencies have no time for 1 base, which decides whether an answer can be in "
                "time; measure it, too"
            )
        _check_part("low_battery", low_battery)
        self._low_battery = low_battery
        measured = sorted(latencies)
        counts = range(1, measured[-1] + 1)
        times = np.interp(counts, measured, [latencies[n] for n in measured])
        self._seconds = dict(zip(counts, times.tolist(), strict=True))

    def choose(self, now: Condition) -> Choice:
        """The number of bases and the robustness for a condition."""
        total = len(self._seconds)
        bases, reason = total, f"Nothing limits the mix of all {total} bases"
        for share, cause in (self._heat(now), self._battery(now)):
            allowed = max(1, int(share * total))
            if allowed < bases:
                bases, reason = allowed, f"The {cause} allows {allowed} of {total} bases"
        if now.latency_s is not None:
            budget = _duration(now.latency_s)
            fitting = [n for n in range(1, bases + 1) if self._seconds[n] <= now.latency_s]
            if not fitting:
                one = _duration(self._seconds[1])
                bases, reason = 1, f"Not even 1 of {total} bases fits into {budget}: it takes {one}"
            elif fitting[-1] < bases:
                bases = fitting[-1]
                reason = f"{bases} of {total} bases {'fits' if bases == 1 else 'fit'} into {budget}"
        if now.hostile > 0:
            reason += f"; hostile input at {now.hostile:.4g} sets the robustness"
        return Choice(bases, now.hostile, f"{reason}.")

    def _heat(self, now: Condition) -> tuple[float, str]:
        """Fraction of the bases that the thermal level allows, and its name in a reason."""
        return _HEAT[now.thermal], f"thermal level {now.thermal!r}"

    def _battery(self, now: Condition) -> tuple[float, str]:
        """Fraction of the bases that the battery allows, and its name in a reason."""
        if now.battery is None or now.charging:
            return 1, "battery"
        cause = f"battery at {100 * now.battery:.4g} %"
        if now.battery <= self._low_battery:
            return 0, cause
        return (1 / 2 if now.battery < 1 / 2 else 1), cause


def measure_latencies(
    run: Callable[[int], None], bases: Sequence[int], repeats: int = 5
) -> dict[int, float]:
    """Seconds that mixing takes on this device, by the number of bases.

    Args:
        run: computes one answer with a number of bases.
        bases: the numbers to measure.
        repeats: runs to time for each number, of which the median counts. One more run comes first,
            because it loads the graph.

    Raises:
        ConfigError: a number of bases, or of repeats, below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, not {repeats}")
    for n in bases:
        _check_bases(n)
    return {n: _median_seconds(run, n, repeats) for n in bases}


def _median_seconds(run: Callable[[int], None], bases: int, repeats: int) -> float:
    run(bases)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(bases)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _check_part(name: str, value: float) -> None:
    """Raise :class:`ConfigError` for a value outside 0 to 1, NaN included."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be from 0 to 1, not {value}")


def _check_bases(n: int) -> None:
    # an int, as keys that come from JSON are not
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"a number of bases must be a whole number from 1, not {n!r}")


def _duration(seconds: float) -> str:
    """``5 ms`` or ``1.2 s``."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1000 * seconds:.4g} ms"
