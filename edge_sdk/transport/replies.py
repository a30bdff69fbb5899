"""What the hub sends back for the batches of a round: gradients, and features."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.messages import Features, Gradient
from edge_sdk.transport.session import Session

BatchReply = Gradient | Features
"""What the hub sends back for a batch."""


class RoundOver(CutlayerError):
    """The hub has ended the round. Nothing more comes back for its batches."""


class BatchReplies:
    """Replies by round and batch. One may arrive before anybody waits for it.

    Replies of rounds that are over are dropped, and whoever waits for one gets
    :class:`RoundOver`.
    """

    def __init__(self) -> None:
        self._futures: dict[tuple[int, int, str], asyncio.Future[Any]] = {}
        self._round: float = 0  # the newest; infinite after the last

    async def wait(
        self, kind: type[BatchReply], session: Session, number: int, batch: int
    ) -> BatchReply:
        """The reply for a batch, as soon as it is here.

        Args:
            kind: :class:`Gradient` or :class:`Features`.
            session: the session that the round came over.
            number: number of the round.
            batch: number of the batch in the round.

        Raises:
            RoundOver: the hub has begun another round, or the job is over.
            SessionLost: the session has ended, and the round with it.
        """
        key = (number, batch, kind.TYPE)
        future = self._futures.setdefault(key, asyncio.get_running_loop().create_future())
        try:
            self.check_round(session, number)
            message: BatchReply = await future
            return message
        finally:
            self._futures.pop(key, None)

    def take(
        self, kind: type[BatchReply], session: Session, number: int, batch: int
    ) -> BatchReply | None:
        """:meth:`wait` without waiting: None if the reply is not here yet."""
        self.check_round(session, number)
        future = self._futures.get((number, batch, kind.TYPE))
        if future is None or not future.done():
            return None
        del self._futures[number, batch, kind.TYPE]
        message: BatchReply = future.result()
        return message

    def check_round(self, session: Session, number: int) -> None:
        """Raise as :meth:`wait` does if the round ``number`` is over, or its session."""
        session.check()
        if number < self._round:
            raise RoundOver(f"round {number} is over")

    def deliver(self, message: BatchReply) -> None:
        """A reply has arrived; it is kept unless its round is over."""
        if message.round < self._round:
            return
        key = (message.round, message.batch, message.TYPE)
        future = self._futures.get(key)
        if future is None:
            future = self._futures[key] = asyncio.get_running_loop().create_future()
        if not future.done():
            future.set_result(message)

    def begin_round(self, number: float) -> None:
        """Rounds before ``number`` are over; infinity ends them all."""
        self._round = number
        for key in [key for key in self._futures if key[0] < number]:
            future = self._futures.pop(key)
            if not future.done():
                future.set_exception(RoundOver(f"round {key[0]} is over"))

    def end_round(self) -> None:
        """The present round is over, whatever the next one is."""
        self.begin_round(self._round + 1)

    def forget(self) -> None:
        """Start over, for a new session; those that somebody waits for are to be failed first."""
        self._round = 0
        self._futures.clear()

    @property
    def pending(self) -> Iterable[asyncio.Future[Any]]:
        """The futures of all replies that are waited for or here."""
        return self._futures.values()
