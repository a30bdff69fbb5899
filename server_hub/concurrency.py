"""Waiting for changes and turns, effects that are complete later, tasks in the background."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from edge_sdk.errors import CutlayerError

log = logging.getLogger("cutlayer.hub")


class Changes:
    """Conditions that are looked at whenever something has changed."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}  # woken in the order of waiting

    async def until(self, condition: Callable[[], bool], deadline: float | None = None) -> None:
        """Wait until ``condition`` holds.

        It is looked at after every :meth:`wake`, and at the deadline.

        Args:
            condition: what to wait for. A condition that only time makes true needs a deadline.
            deadline: seconds on the loop's clock.
        """
        loop = asyncio.get_running_loop()
        while True:
            late = deadline is not None and loop.time() >= deadline
            if condition():
                return
            if late:
                deadline = None
            await self.next(deadline)

    async def next(self, deadline: float | None = None) -> None:
        """Wait for the next :meth:`wake`, or for the deadline: seconds on the loop's clock."""
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[None] = loop.create_future()
        self._waiters[changed] = None
        left = None if deadline is None else max(deadline - loop.time(), 0.0)
        try:
            await asyncio.wait([changed], timeout=left)
        finally:
            del self._waiters[changed]

    def wake(self) -> None:
        """Say that something has changed: everybody who waits looks again."""
        for waiter in list(self._waiters):
            if not waiter.done():
                waiter.set_result(None)


class Effect:
    """The effect of a message, which may be complete later.

    A message is settled, and so acknowledged, when its effect is complete. Whoever takes in a
    message returns its effect, or None if it is complete at once.
    """

    def __init__(self) -> None:
        self._complete = False
        self._then: Callable[[], None] | None = None

    def complete(self) -> None:
        """Say that the effect is complete. Saying so twice changes nothing."""
        if not self._complete:
            self._complete = True
            if self._then is not None:
                self._then()

    def when_complete(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the effect is complete; at once if it is already."""
        self._then = then
        if self._complete:
            then()


class Turns:
    """Lets one task go on at a time, by turns of their owners.

    An owner with many tasks makes another one wait for a single task at most.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the next owner first

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Wait for a turn of ``owner``; it is over when the block ends."""
        if self._busy:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(owner, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():  # the turn had just begun
                    self._next()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._next()

    def _next(self) -> None:
        """Let the next owner's first task go on; the owner then stands last."""
        self._busy = False
        while self._waiting:
            owner = next(iter(self._waiting))
            tasks = self._waiting.pop(owner)
            task = tasks.popleft()
            if tasks:
                self._waiting[owner] = tasks
            if not task.done():
                self._busy = True
                task.set_result(None)
                return


class BackgroundTasks:
    """Tasks that nobody waits for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine; a failure is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def finished(self, timeout_s: float) -> None:
        """Wait until all tasks are done, but no longer than ``timeout_s``."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            expected = isinstance(task.exception(), CutlayerError)
            log.log(logging.WARNING if expected else logging.ERROR, "%s", task.exception())
