"""A session: one channel over successive links. Both device and hub run it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

from edge_sdk.errors import CutlayerError, LinkClosed, ProtocolError
from edge_sdk.protocol.channel import Channel, Delivery, SequenceGap
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import kind_of
from edge_sdk.protocol.messages import Ack, Error, Message
from edge_sdk.protocol.states import SessionState, SessionTracker
from edge_sdk.transport.flow import FlowControl
from edge_sdk.transport.link import Link

log = logging.getLogger("cutlayer.session")

Count = Callable[[str, int, int], None]
"""Called for every frame with its message type, the bytes received and the bytes sent."""


class SessionLost(CutlayerError):
    """The session ended; what its channel still held will not be delivered."""


class Session:
    """Sends messages over whatever link there is, and waits when the channel's window is full.

    Messages are queued in order and written by one task per link. The queue holds at most the
    window's reliable messages, and answers to what the peer has sent. A hub bounds these by flow
    control: while too much waits, it reads nothing more.

    Args:
        channel: the channel that goes over the links.
        count: called for every frame, to account for traffic.
        flow: says when to read on; None to read always.
    """

    def __init__(
        self,
        channel: Channel,
        count: Count = lambda kind, up, down: None,
        flow: FlowControl | None = None,
    ) -> None:
        self.channel = channel
        self._count = count
        self._flow = flow
        self._sizes: dict[int, int] = {}  # of frames that are delivered and not settled, by number
        self._frames: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Condition()
        self._link: Link | None = None
        self._writer: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ack_due = False
        self._lost: str | None = None
        self._tracker = SessionTracker()

    @property
    def state(self) -> SessionState:
        """What the device does in this session, by the messages that this end has seen."""
        return self._tracker.state

    @property
    def extensions(self) -> frozenset[str]:
        """The extensions that both sides have agreed on, for the life of the session."""
        return self.channel.extensions

    @property
    def linked(self) -> bool:
        """Whether a link is up."""
        return self._link is not None

    def post(self, message: Message) -> None:
        """Queue a message now.

        Reliable messages survive a broken link; unreliable ones are for the present link only.

        Raises:
            ProtocolError: the peer has left a whole window of messages unsettled.
            SessionLost: the session has ended.
        """
        self.check()
        if message.RELIABLE and self.channel.full:
            raise ProtocolError(
                ErrorCode.WINDOW_EXCEEDED, f"{self.channel.window} messages wait to be acknowledged"
            )
        frame = self.channel.send(message)
        self._follow(message)
        if self._link is not None:
            self._queue(frame)
            self._ack_due = False  # the frame carries it
            self._wake.set()

    def check(self) -> None:
        """Raise :class:`SessionLost` if the session has ended."""
        if self._lost is not None:
            raise SessionLost(self._lost)

    async def send(self, message: Message) -> None:
        """:meth:`post`, but wait while the window is full."""
        if message.RELIABLE:
            async with self._room:
                await self._room.wait_for(lambda: self._lost or not self.channel.full)
                self.post(message)
        else:
            self.post(message)

    def settle(self, seq: int) -> None:
        """Say that a delivered message has had its effect; an acknowledgement goes to the peer."""
        if self._flow is not None:
            self._flow.incoming.remove(self._sizes.pop(seq, 0))
        if self.channel.settle(seq) and self._link is not None:
            self._ack_due = True
            self._wake.set()

    async def lose(self, reason: str, error: ProtocolError | None = None) -> None:
        """End the session and close its link: waiting senders get :class:`SessionLost`.

        Args:
            reason: why the session ends.
            error: sent to the peer before the link closes, if given.
        """
        self.end(reason)
        await self._notify()
        if error is not None and self._link is not None:
            if self._writer is not None:
                self._writer.cancel()
            await self._send_error(self._link, error)
        await self.unlink()

    def end(self, reason: str) -> None:
        """End the session without closing its link: nothing is sent or delivered any more."""
        self._lost = reason
        self._tracker.end()
        self._sizes.clear()
        if self._flow is not None:
            self._flow.incoming.clear()

    async def unlink(self) -> None:
        """Close the present link, if any; :meth:`run` then raises :class:`LinkClosed`."""
        if self._link is not None:
            await self._link.close()

    async def run(
        self, link: Link, last_seq: int, handle: Callable[[Delivery], None], first: bytes = b""
    ) -> None:
        """Serve the session over one link until it breaks.

        Args:
            link: a link whose handshake is done.
            last_seq: what the peer said that it has settled.
            handle: called for each delivery; must not block.
            first: a frame that goes before all others (the hub's ``welcome``).

        Raises:
            LinkClosed: the link ended, or lost frames, or another one took its place.
            ProtocolError: the peer broke the protocol; an ``error`` was sent and the link closed.
        """
        if self._link is not None:  # the peer came back before we saw the old link break
            if self._writer is not None:
                self._writer.cancel()
            self._closing = asyncio.create_task(self._link.close())
        self._unqueue()
        if first:
            self._queue(first)
        self._link = link
        self._ack_due = self.channel.settled > 0  # of what was settled while there was no link
        self._wake.set()
        writer = self._writer = asyncio.create_task(self._write(link))
        try:
            for waiting in self.channel.resume(last_seq):
                self._queue(waiting)
            await self._notify()
            while True:
                await self._may_read(writer)
                data = await link.receive()
                if self._link is not link:
                    raise LinkClosed("the peer came back over another link")
                frame = self.channel.decode(data)
                self._count(frame.message.TYPE, len(data), 0)
                delivery = self.channel.accept(frame)
                await self._notify()
                if delivery is not None:
                    if self._flow is not None and delivery.seq:
                        self._sizes[delivery.seq] = len(data)
                        self._flow.incoming.add(len(data))
                    self._follow(delivery.message)
                    handle(delivery)
        except SequenceGap as error:  # the session can go on over another link
            writer.cancel()
            await self._send_error(link, error)
            raise LinkClosed(str(error)) from error
        except ProtocolError as error:
            writer.cancel()
            await self._send_error(link, error)
            raise
        finally:
            writer.cancel()
            if self._link is link:
                self._link = None
                self._unqueue()
            await link.close()

    async def _may_read(self, writer: asyncio.Task[None]) -> None:
        """Wait until the flow control lets the session read on.

        Raises:
            LinkClosed: the link broke meanwhile, or another one took its place.
        """
        if self._flow is None:
            return
        delay = self._flow.frames.take(asyncio.get_running_loop().time())
        if delay:
            await asyncio.sleep(delay)
        for backlog in (self._flow.outgoing, self._flow.incoming):
            if backlog.full:
                room = asyncio.create_task(backlog.room())
                try:
                    await asyncio.wait([room, writer], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    room.cancel()
                if writer.done():
                    raise LinkClosed("the connection closed while the peer had to wait")

    def _queue(self, frame: bytes) -> None:
        self._frames.append(frame)
        if self._flow is not None:
            self._flow.outgoing.add(len(frame))

    def _unqueue(self) -> None:
        self._frames.clear()
        if self._flow is not None:
            self._flow.outgoing.clear()

    def _follow(self, message: Message) -> None:
        if not self._tracker.follow(message):
            log.debug("%s has no place in the state %s", message.TYPE, self.state)

    async def _send_error(self, link: Link, error: ProtocolError) -> None:
        """Send what the peer did wrong, past everything that is queued."""
        message = Error(
            code=error.code, message=str(error)[:4096], fatal=error.code.is_fatal, field=error.field
        )
        with contextlib.suppress(CutlayerError, TimeoutError):  # gone already is as good
            async with asyncio.timeout(5):
                await link.send(self.channel.send(message))

    async def _notify(self) -> None:
        async with self._room:
            self._room.notify_all()

    async def _write(self, link: Link) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._frames or self._ack_due:
                queued = bool(self._frames)
                if queued:
                    frame = self._frames[0]
                else:
                    frame = self.channel.send(Ack())
                    self._ack_due = False
                self._count(kind_of(frame), 0, len(frame))
                try:
                    await link.send(frame)
                except CutlayerError:
                    return  # the reader of this link sees it close as well
                if queued and self._frames and self._frames[0] is frame:
                    self._frames.popleft()
                    if self._flow is not None:
                        self._flow.outgoing.remove(len(frame))
