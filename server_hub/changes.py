"""Waiting for something to happen, without asking again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """Conditions that are looked at whenever something has changed."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}  # woken in the order of waiting

    async def until(self, condition: Callable[[], bool], deadline: float | None = None) -> None:
        """Wait until ``condition`` holds.

        It is looked at after every :meth:`wake`, and at the deadline (seconds on the loop's
        clock); a condition that only time makes true needs one.
        """
        loop = asyncio.get_running_loop()
        while not condition():
            changed: asyncio.Future[None] = loop.create_future()
            self._waiters[changed] = None
            left = None if deadline is None else max(deadline - loop.time(), 0.0)
            try:
                await asyncio.wait([changed], timeout=left)
            finally:
                del self._waiters[changed]

    def wake(self) -> None:
        """Something happened: whoever waits looks again."""
        for waiter in list(self._waiters):
            if not waiter.done():
                waiter.set_result(None)
