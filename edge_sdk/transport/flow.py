"""Flow control: when a session stops reading, so that its peer has to wait.

TCP carries the pause on to the peer. Nothing is refused and nothing is lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


class Backlog:
    """Bytes of messages that wait in one session, or in several sessions together.

    Args:
        limit: number of bytes above which the backlog is full.
        whole: backlog of all sessions together; None for a backlog of its own.
    """

    def __init__(self, limit: int, whole: Backlog | None = None) -> None:
        self._limit, self._whole = limit, whole
        self._bytes = 0
        self._eased = asyncio.Event()
        self._waiting: set[Backlog] = set()

    @property
    def bytes(self) -> int:
        """Number of bytes that wait."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether to stop reading: too much waits here, or in all sessions and some of it here."""
        whole_full = self._whole is not None and self._whole.full
        return self._bytes > self._limit or (whole_full and self._bytes > 0)

    def add(self, size: int) -> None:
        """A message of ``size`` bytes waits."""
        self._bytes += size
        if self._whole is not None:
            self._whole.add(size)

    def remove(self, size: int) -> None:
        """A message of ``size`` bytes waits no longer."""
        self._bytes -= size
        self._eased.set()
        if self._whole is not None:
            self._whole.remove(size)
        if not self.full:
            for session in self._waiting:
                session._eased.set()
            self._waiting.clear()

    def clear(self) -> None:
        """Nothing waits any more."""
        self.remove(self._bytes)

    async def room(self) -> None:
        """Wait until the backlog is not full."""
        while self.full:
            self._eased.clear()
            if self._whole is not None:
                self._whole._waiting.add(self)
            await self._eased.wait()


class TokenBucket:
    """A budget per second that may be saved up.

    Args:
        rate: tokens that come in per second.
        burst: largest number of tokens that are saved; at the start all of them are there.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = burst, 0.0

    def take(self, now: float) -> float:
        """Take a token, also one that is not there yet.

        Args:
            now: seconds on a clock that never goes back.

        Returns:
            Seconds to wait until the token is there; 0 if it was saved.
        """
        self._fill(now)
        self._tokens -= 1
        return max(-self._tokens / self._rate, 0.0)

    def try_take(self, now: float) -> bool:
        """Take a token if one is there; returns whether it was. ``now`` is as in :meth:`take`."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _fill(self, now: float) -> None:
        self._tokens = min(self._tokens + (now - self._at) * self._rate, self._burst)
        self._at = now


@dataclass
class FlowControl:
    """What a session waits for before it reads on.

    Attributes:
        outgoing: bytes of frames that wait for the link.
        incoming: bytes of frames that have been delivered and are not settled.
        frames: budget of frames that the peer may send.
    """

    outgoing: Backlog
    incoming: Backlog
    frames: TokenBucket
