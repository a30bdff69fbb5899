"""Settings of the trunk: the table ``[trunk]`` of ``hub.toml``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from edge_sdk.runtime import MAX_THREADS

Precision = Literal["fp32", "bf16"]
"""Arithmetic of a step: float32, or bfloat16 where autocast allows it; weights are float32."""


@dataclass(frozen=True)
class TrunkTraining:
    """Training of the trunk.

    Attributes:
        device: torch device; ``auto`` takes a GPU if there is one.
        optimizer: ``sgd`` or ``adamw``.
        hyper: hyper-parameters of the optimizer.
        precision: ``fp32``, or ``bf16`` for automatic mixed precision with weights in float32.
        max_rows: largest number of rows in one merged step; a merged batch is a larger batch.
        max_tokens: largest number of positions of texts in one merged step, padding included; a
            single batch may be larger.
        max_mb: largest size of the packed activations in one merged step, in MiB; a single batch
            may be larger.
        mix_rows: number of rows that wait in a shuffle buffer, so that every step draws batches of
            many devices; 0 for steps on batches as they arrive, by turns of the devices.
        wait_s: seconds that a step waits for more rows to merge.
        max_norm: gradients of a step are scaled down to this norm, so that no device can throw
            the trunk far off with activations that are large but finite.
        threads: torch threads; 0 for torch's default.
        arena_mb: shared memory between the hub's process and the trunk's, in MiB; reserved at the
            start.
        step_s: seconds that one step, or one answer, may take. The trunk's process is then ended
            and started again.
    """

    device: str = "auto"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    hyper: dict[str, float] = field(default_factory=dict)
    precision: Precision = "fp32"
    max_rows: int = 256
    max_tokens: int = 32_768
    max_mb: int = 256
    mix_rows: int = 0
    wait_s: float = 0.02
    max_norm: float = 25.0
    threads: int = 0
    arena_mb: int = 256
    step_s: float = 600.0

    def __post_init__(self) -> None:
        if self.mix_rows < 0:
            raise ValueError(f"mix_rows is {self.mix_rows}, must be 0 or more")
        if not 0 <= self.wait_s < math.inf:
            raise ValueError(f"wait_s is {self.wait_s}, must be 0 or more, and finite")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm is {self.max_norm}, must be above 0, or inf for no bound")
        if not 0 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads is {self.threads}, must be from 0 to {MAX_THREADS}")
        for name in ("max_rows", "max_tokens", "max_mb", "arena_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not self.step_s > 0:
            raise ValueError(f"step_s is {self.step_s}, must be positive")
