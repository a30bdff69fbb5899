"""Waiting for changes, and work beside the messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from server_hub.trunk.process import TrunkFailed


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


log = logging.getLogger("cutlayer.hub")


class Background:
    """Tasks that nobody waits for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run it; a failure is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            level = logging.WARNING if isinstance(task.exception(), TrunkFailed) else logging.ERROR
            log.log(level, "%s", task.exception())
