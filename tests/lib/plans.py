"""A plan without compilers, for tests that ask about choices and operations, not about files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from export.steps import ClientSteps
from export.writer import Tier, write_tier


def write_without_lowering(
    steps: ClientSteps, name: str, tier: Tier, *args: Any, **settings: Any
) -> Any:
    """Do the work of ``write_tier`` without lowering; the operations of a step stay the same."""
    return write_tier(steps, name, replace(tier, runtime="torch"), *args, **settings)
