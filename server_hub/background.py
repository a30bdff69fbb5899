"""Work beside the messages: errors are logged, and nothing is lost half-way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from server_hub.worker import TrunkFailed

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
