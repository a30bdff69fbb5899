"""A virtual clock: an asyncio event loop in which waiting takes no time.

The code of hub and devices runs unchanged; only the clock is different. When all tasks wait, the
clock jumps to the next event. All tasks run in one thread, in an order that depends on the job
alone, so a run can be repeated exactly.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from edge_sdk.errors import CutlayerError

T = TypeVar("T")


class Stuck(CutlayerError):
    """All tasks wait, and no event is left that could wake one of them."""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that never waits: it advances the clock by the length of the wait instead."""

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

    Work for other threads (``asyncio.to_thread``) runs at once, in this thread. It takes the
    virtual time that it passes to :meth:`charge` while it runs.

    Args:
        start: time of the clock at the beginning, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._clock = _JumpingSelector()
        self._clock.now = start
        self._charged = 0.0
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the time of the virtual clock, in seconds."""
        return self._clock.now

    def charge(self, seconds: float) -> None:
        """Add ``seconds`` of virtual time to the work that runs now in :meth:`run_in_executor`."""
        self._charged += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run ``func`` now; the future has its result after the virtual time that it charges."""
        future: asyncio.Future[T] = self.create_future()
        self._charged = 0.0
        try:
            result = func(*args)
        except Exception as error:
            future.set_exception(error)
            return future

        def settle() -> None:
            if not future.done():  # the task that waited for it may have been cancelled
                future.set_result(result)

        if self._charged > 0:
            self.call_later(self._charged, settle)
        else:
            settle()
        return future


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]], start: float = 0.0) -> T:
    """Run a coroutine to its end on a virtual clock that starts at ``start`` seconds.

    Raises:
        Stuck: all tasks wait, and no event is left.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return runner.run(main(loop))
