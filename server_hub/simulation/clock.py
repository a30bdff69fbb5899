"""A virtual clock: an asyncio event loop in which waiting takes no time.

Hub and devices run as they are; only what they wait for is different. When nobody can go on, time
jumps to the next moment at which somebody can. Everything happens in one thread and in an order
that depends on nothing but the job, so a run can be repeated exactly.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from edge_sdk.errors import CutlayerError

T = TypeVar("T")


class Stuck(CutlayerError):
    """Everybody waits, and nothing will happen any more."""


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for events, puts the clock forward by as long as the wait would be."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise Stuck("the simulation waits for something that never comes")
        if not events and timeout:
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a virtual clock.

    Work that is given to a thread elsewhere (``asyncio.to_thread``) runs at once, in this thread.
    It takes as much virtual time as it says through :meth:`charge` while it runs.

    Args:
        start: the clock's first reading, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._clock = _JumpingSelector()
        self._clock.now = start
        self._charged = 0.0
        super().__init__(self._clock)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clock.now

    def charge(self, seconds: float) -> None:
        """Say that the work which runs now takes so long on the device that it stands for."""
        self._charged += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run ``func`` now; its result is there after the time that it has charged."""
        future: asyncio.Future[T] = self.create_future()
        self._charged = 0.0
        try:
            result = func(*args)
        except Exception as error:
            future.set_exception(error)
            return future

        def settle() -> None:
            if not future.done():  # whoever waited for it may have been cancelled
                future.set_result(result)

        if self._charged > 0:
            self.call_later(self._charged, settle)
        else:
            settle()
        return future


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]], start: float = 0.0) -> T:
    """Run a coroutine to its end on a virtual clock that starts at ``start`` seconds."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return runner.run(main(loop))
