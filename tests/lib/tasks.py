"""Coroutines as tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


def run(test: Awaitable[T], limit_s: float = 20.0) -> T:
    """Run a test; fail if it exceeds its time limit.

    Args:
        test: the test, not yet started.
        limit_s: the limit, in seconds.

    Returns:
        The test's result.
    """

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await test

    return asyncio.run(limited())
