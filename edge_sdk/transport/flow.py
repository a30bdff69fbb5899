"""Flow control: when a session stops reading, so that its peer has to wait.

TCP carries the pause on to the peer. Nothing is refused and nothing is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.protocol.pieces import PIECE

STALLED_S = 10.0
"""Seconds in which a session that others wait for has to bring a piece."""


class Backlog:
    """Bytes of messages that wait in one session, or in several sessions together.

    A message that arrives in pieces takes memory until it is complete. When there is no room left
    for all sessions together, the one whose message began first reads on, so that some message gets
    complete. If it brings less than a piece in :data:`STALLED_S` while others wait, it is given up.

    Args:
        limit: number of bytes above which the backlog is full.
        whole: backlog of all sessions together; None for a backlog of its own.
        give_up: called when others wait for this session, and it brings too little.
    """

    def __init__(
        self,
        limit: int,
        whole: Backlog | None = None,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._limit, self._whole, self._give_up = limit, whole, give_up
        self._bytes = 0
        self._added = 0  # bytes in all
        self._begun: dict[Backlog, None] = {}  # sessions with a message in pieces, in order
        self._first_seen: tuple[Backlog, int, float] | None = None
        self._eased = asyncio.Event()
        self._waiting: set[Backlog] = set()

    @property
    def bytes(self) -> int:
        """Number of bytes that wait."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether to stop reading: too much waits here, or in all sessions and some of it here."""
        if self._bytes > self._limit or self._whole is None:
            return self._bytes > self._limit
        return self._whole.full and self._bytes > 0 and self._whole.first is not self

    @property
    def first(self) -> Backlog | None:
        """Of several sessions, that whose message in pieces began first; None without any."""
        return next(iter(self._begun), None)

    def begin(self) -> None:
        """A message in pieces has begun, or goes on."""
        if self._whole is not None:
            self._whole._begun.setdefault(self)

    def complete(self) -> None:
        """The message in pieces is complete, or will never be."""
        if self._whole is not None and self in self._whole._begun:
            del self._whole._begun[self]
            self._whole._ease()

    def hold(self, size: int) -> None:
        """Messages of ``size`` bytes wait in all."""
        if size > self._bytes:
            self.add(size - self._bytes)
        else:
            self.remove(self._bytes - size)

    def add(self, size: int) -> None:
        """A message of ``size`` bytes waits."""
        self._bytes += size
        self._added += size
        if self._whole is not None:
            self._whole.add(size)

    def remove(self, size: int) -> None:
        """A message of ``size`` bytes waits no longer."""
        self._bytes -= size
        self._eased.set()
        if self._whole is not None:
            self._whole.remove(size)
        if not self.full:
            self._ease()

    def _ease(self) -> None:
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
            try:
                async with asyncio.timeout(STALLED_S):
                    await self._eased.wait()
            except TimeoutError:
                if self._whole is not None and self._whole.full:
                    self._whole._look_at_first(asyncio.get_running_loop().time())

    def _look_at_first(self, now: float) -> None:
        """Give up the session that goes first if it has brought too little for long."""
        first, seen = self.first, self._first_seen
        if first is None:
            return
        if seen is None or seen[0] is not first or first._added - seen[1] >= PIECE:
            self._first_seen = first, first._added, now
        elif now - seen[2] >= STALLED_S:
            first._give_up()


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

    def give_back(self) -> None:
        """Put back a token that :meth:`take` took."""
        self._tokens += 1

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
