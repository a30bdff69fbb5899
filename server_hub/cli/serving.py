"""What commands that serve until they are ended have in common: their log, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any

_ENDING_S = 9.0
"""Seconds after a signal in which a hub closes everything; then it ends in any case."""


def log_to_stderr(*, quiet: bool) -> None:
    """Write the log to stderr; only warnings and errors with ``quiet``."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("websockets").setLevel(logging.CRITICAL)


async def until_signal(serving: Coroutine[Any, Any, None]) -> signal.Signals | None:
    """Serve until the end, or until SIGINT or SIGTERM; a second signal ends the process at once.

    Returns:
        The signal; None if serving has come to its end.
    """
    task = asyncio.create_task(serving)
    received: signal.Signals | None = None

    def end(number: signal.Signals) -> None:
        nonlocal received
        if received is not None:
            _leave(number)
        received = number
        threading.Thread(target=_leave, args=(number, _ENDING_S), daemon=True).start()
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels the main task
            asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        await task
    except asyncio.CancelledError:
        return received or signal.SIGINT
    return None


def _leave(number: signal.Signals, after_s: float = 0.0) -> None:
    """End this process at once. What is being written is left out: files are replaced whole."""
    time.sleep(after_s)
    print(f"cutlayer: ended by {number.name} before everything was closed", file=sys.stderr)
    sys.stderr.flush()
    os._exit(128 + number)
