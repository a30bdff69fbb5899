"""Requests for the pieces of a blob, several at a time.

One request at a time wastes a round trip per piece. So many are open as the link needs, and no
more: what waits at the hub for a slow link would only be in the way of other messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from edge_sdk.errors import BundleError, CutlayerError
from edge_sdk.protocol.messages import Blob, BlobGet

MOST_OPEN = 8
"""Largest number of open requests: with pieces of 256 KiB, 20 MB/s at a round trip of 100 ms."""

_LONG_S = 1.0
"""Seconds until an answer above which fewer requests are open: they wait behind each other."""

_PATIENCE_S = 30.0
"""Shortest time without an answer after which everything is asked for again, in seconds."""


class BlobRequests:
    """The requests of one download: a state machine without I/O.

    The size of a piece is up to the hub, and known after the first answer.

    Args:
        name: sha256 of the blob.
        have: number of bytes that are already here.
        limit: largest size that the blob may have, in bytes.
    """

    def __init__(self, name: str, have: int, limit: int) -> None:
        self._name, self._have, self._limit = name, have, limit
        self._next = have  # first byte that nobody has asked for
        self._again: deque[int] = deque()
        self._open: dict[int, float] = {}  # when each open request was sent, by offset, in order
        self._early: dict[int, bytes] = {}
        self._step = 0  # size of a piece
        self._most_open = 1
        self._size: int | None = None
        self.patience_s = _PATIENCE_S
        """Seconds without an answer after which to :meth:`ask_again`."""

    @property
    def done(self) -> bool:
        """Whether everything is here."""
        return self._size is not None and self._have >= self._size

    @property
    def open(self) -> int:
        """Number of requests that are not answered."""
        return len(self._open)

    def due(self, now: float) -> list[BlobGet]:
        """The requests to send now, at ``now`` seconds."""
        asked = []
        while len(self._open) < self._most_open:
            if self._again:
                offset = self._again.popleft()
                if offset < self._have or offset in self._early:
                    continue  # came after all
            elif self._size is None:
                if self._open:
                    break
                offset = self._next
            elif self._next < self._size:
                offset = self._next
                self._next += self._step
            elif not self._open and not self.done:
                offset = self._have  # pieces had other sizes than the first one
            else:
                break
            self._open[offset] = now
            asked.append(BlobGet(hash=self._name, offset=offset))
        return asked

    def ask_again(self) -> None:
        """Ask for what is open again: the connection broke, or no answer came for long."""
        self._again = deque(sorted({*self._again, *self._open}))
        self._open.clear()
        self._most_open = max(self._most_open // 2, 1)

    def take(self, blob: Blob, now: float) -> bytes:
        """Take an answer; returns the bytes that are next in order, if there are any.

        Args:
            blob: the answer. One that nobody waits for is ignored.
            now: seconds on the clock of :meth:`due`.

        Raises:
            BundleError: the answer is not a piece of this blob, or the blob is too large.
        """
        if blob.hash != self._name or blob.offset not in self._open:
            return b""
        self._check(blob)
        end = blob.offset + len(blob.data)
        if self._size is None:
            self._size, self._step, self._next = blob.size, len(blob.data), end
        for earlier in list(self._open):
            asked_at = self._open.pop(earlier)
            if earlier == blob.offset:
                break
            self._again.append(earlier)  # answers come in order: this one was lost
        if end < min(blob.offset + self._step, self._size, self._next):
            self._again.append(end)  # the hub's pieces have become smaller
        self._early[blob.offset] = blob.data
        took = now - asked_at
        self.patience_s = max(_PATIENCE_S, 4 * took)
        self._most_open = min(max(self._most_open + (1 if took < _LONG_S else -1), 2), MOST_OPEN)
        return b"".join(self._ready())

    def _ready(self) -> list[bytes]:
        ready = []
        for offset in sorted(self._early):
            if offset > self._have:
                break
            data = self._early.pop(offset)[self._have - offset :]
            ready.append(data)
            self._have += len(data)
        return ready

    def _check(self, blob: Blob) -> None:
        short = f"{self._name[:12]}…"
        if blob.size > self._limit:
            raise BundleError(
                f"the hub says that blob {short} has {blob.size} bytes; it may have {self._limit}"
            )
        if self._size is not None and blob.size != self._size:
            raise BundleError(
                f"the hub says that blob {short} has {blob.size} bytes, and said {self._size}"
            )
        if blob.offset + len(blob.data) > blob.size:
            raise BundleError(f"the hub sent more of blob {short} than its {blob.size} bytes")
        if not blob.data and blob.offset < blob.size:
            raise BundleError(f"the hub sent an empty piece of blob {short}")


class Download:
    """A download in progress, between the task that waits for it and the link that brings it.

    Args:
        requests: the requests.
        append: receives the bytes, in order.
    """

    def __init__(self, requests: BlobRequests, append: Callable[[bytes], None]) -> None:
        self.requests, self._append = requests, append
        self.event = asyncio.Event()
        """Set when there may be something new to ask for."""
        self._failure: CutlayerError | None = None
        self._arrived: list[bytes] = []

    def take(self, blob: Blob, now: float) -> bool:
        """Take an answer; returns whether it answers one of the open requests."""
        before = self.requests.open
        try:
            self._arrived.append(self.requests.take(blob, now))
        except BundleError as error:
            self.fail(error)
        self.event.set()
        return self.requests.open < before

    def lost(self) -> None:
        """The link broke."""
        self.requests.ask_again()
        self.event.set()

    def fail(self, error: CutlayerError) -> None:
        """The download has failed."""
        self._failure = error
        self.event.set()

    async def progress(self) -> None:
        """Wait for an answer, and hand on what came; without any for long, ask again.

        Raises:
            CutlayerError: the download has failed.
        """
        try:
            # not wait_for: in Python 3.11 that may lose a cancellation
            async with asyncio.timeout(self.requests.patience_s):
                await self.event.wait()
        except TimeoutError:
            self.requests.ask_again()
            self.requests.patience_s *= 2  # on a slow link every question comes on top of the last
        if self._failure is not None:
            raise self._failure
        for data in self._arrived:
            self._append(data)
        self._arrived.clear()
