"""A plan without compilers, for tests that ask about choices and operations, not about files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from export.bundles.writer import Tier, write_tier
from export.steps.client_steps import ClientSteps


def write_without_lowering(
    steps: ClientSteps, name: str, tier: Tier, *args: Any, **settings: Any
) -> Any:
    """Do the work of ``write_tier`` without lowering; the operations of a step stay the same."""
    return write_tier(steps, name, replace(tier, runtime="torch"), *args, **settings)
