"""The device's connection to its hub: one session kept alive over links that break."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

from edge_sdk.errors import CutlayerError, HubError, LinkClosed
from edge_sdk.protocol.channel import CannotResume, Channel, Delivery
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.evaluation import Evaluate
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.message import EXTENSIONS, PIECES
from edge_sdk.protocol.messages import (
    VERSION,
    Answer,
    Blob,
    Bye,
    Error,
    Features,
    Gradient,
    Hello,
    Infer,
    Message,
    Move,
    Round,
    Stop,
    Welcome,
)
from edge_sdk.protocol.states import ConnectionEvent, ConnectionState, next_connection_state
from edge_sdk.protocol.tensors import Array
from edge_sdk.transport.blob_requests import BlobRequests, Download
from edge_sdk.transport.link import Link
from edge_sdk.transport.replies import BatchReplies
from edge_sdk.transport.session import Session, SessionLost

_LONGEST_PAUSE_S = 10.0
"""Longest pause between two attempts to connect. A link that lasted as long has proved good."""

Work = tuple[Session, Delivery]
"""A ``round``, ``evaluate``, ``move`` or ``stop``, with the session that it came over."""

OpenLink = Callable[[], Awaitable[Link]]
"""Opens a link to the hub, or raises :class:`LinkClosed`."""


@dataclass(frozen=True)
class Question:
    """The packed activations that the hub finishes an answer from.

    Attributes:
        parts: the packed tensors by name, as the manifest's ``packed`` lists them.
        tier: tier of the bundle that packed them.
        base: number of the base network; 0 for a single model.
        robustness: weight of the noise norms above the cut, from 0 to 1.
    """

    parts: dict[str, Array]
    tier: str
    base: int = 0
    robustness: float = 0.0


class Connection:
    """Connects, says hello, resumes after a break, and joins anew if the hub forgot the session.

    Args:
        open_link: opens a link to the hub.
        token: the device's token, which says who it is.
        tier: the tier whose bundle the device can carry; None takes the hub's choice.
        patience_s: seconds to go on trying to (re)connect.
        memory_mb: MB that the device can spare for training; None if it does not say.
        extensions: extensions that the device offers to speak.
    """

    def __init__(
        self,
        open_link: OpenLink,
        *,
        token: str,
        tier: str | None,
        patience_s: float,
        memory_mb: int | None = None,
        extensions: Collection[str] = EXTENSIONS,
    ) -> None:
        self._open_link, self._token, self.tier = open_link, token, tier
        self._patience_s, self._memory_mb = patience_s, memory_mb
        self._extensions = list(extensions)
        # so that many devices that lost one hub do not all come back at the same moment
        self._jitter = random.Random(token)
        self._state = ConnectionState.DISCONNECTED
        self._session: Session | None = None
        self._session_id: str | None = None
        self._welcome: Welcome | None = None
        self._linked = asyncio.Event()  # set while linked, and for good after a failure
        self._failure: CutlayerError | None = None
        self._download: Download | None = None
        self._downloading = asyncio.Lock()
        self._unwanted = 0  # answers still to come over this link, for downloads that are over
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._requests = 0
        self.replies = BatchReplies()
        self._work: asyncio.Queue[Work | CutlayerError] = asyncio.Queue()
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> Welcome:
        """Connect, and go on reconnecting in the background.

        Raises:
            HubError: the hub refused the device for good, or with "try later" for ``patience_s``.
            LinkClosed: the hub could not be reached for ``patience_s``.
        """
        self._keeper = asyncio.create_task(self._keep_linked())
        await self._linked.wait()
        self.raise_failure()
        return self.welcome

    async def renew(self) -> Welcome:
        """Reconnect, for a welcome that names the present states."""
        assert self._session is not None
        self._linked.clear()
        await self._session.unlink()
        await self._linked.wait()
        self.raise_failure()
        return self.welcome

    async def close(self, reason: str) -> None:
        """Send ``bye`` if there is a link, wait up to 5 s until it is settled, and close."""
        if self._session is not None and self._failure is None:
            with contextlib.suppress(CutlayerError, TimeoutError):
                channel = self._session.channel
                async with asyncio.timeout(5):
                    await self.send(Bye(reason=reason))
                    while channel.unacked and self._session.linked:
                        await asyncio.sleep(0.01)
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._enter(ConnectionEvent.BYE)
        self._fail(LinkClosed("the device was closed"))

    @property
    def state(self) -> ConnectionState:
        """Whether the device is connected; see ``docs/protocol.md``."""
        return self._state

    @property
    def linked(self) -> bool:
        """Whether there is a link to the hub now."""
        return self._state is ConnectionState.LINKED

    @property
    def welcome(self) -> Welcome:
        """The hub's last welcome."""
        assert self._welcome is not None
        return self._welcome

    @property
    def failure(self) -> CutlayerError | None:
        """The error that ended the connection for good; None while it has not ended."""
        return self._failure

    @property
    def largest_message(self) -> int:
        """Bytes of the largest message that the hub takes."""
        in_pieces = self.welcome.max_message if PIECES in self.extensions else None
        return in_pieces or self.welcome.max_frame

    @property
    def extensions(self) -> frozenset[str]:
        """The extensions that the present session has agreed on."""
        return self._session.extensions if self._session is not None else frozenset()

    def raise_failure(self) -> None:
        """Raise the error that ended the connection, if it has ended."""
        if self._failure is not None:
            raise self._failure

    async def send(self, message: Message) -> None:
        """Send over the present session; waits while its window is full."""
        if self._session is None:
            await self._linked.wait()
        self.raise_failure()
        assert self._session is not None
        await self._session.send(message)

    async def next_work(self) -> Work:
        """The next ``round``, ``evaluate``, ``move`` or ``stop``.

        Raises:
            SessionLost: the hub has forgotten the session; send ``ready`` again.
            CutlayerError: the connection has ended.
        """
        item = await self._work.get()
        if isinstance(item, CutlayerError):
            raise item
        return item

    async def ask(self, question: Question) -> Answer:
        """The hub's half of an answer.

        Without a link the question waits outside the window, so that questions that nobody waits
        for any more take no place there, and the hub does not get them.

        Raises:
            LinkClosed: the hub restarts.
            CutlayerError: the connection has ended, see :attr:`failure`.
        """
        await self._linked.wait()
        self._requests += 1
        request = self._requests
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[request] = future
        try:
            await self.send(Infer(request=request, **vars(question)))
            return await future
        except SessionLost:
            self.raise_failure()
            raise LinkClosed("the hub restarted; ask again") from None
        finally:
            del self._answers[request]

    async def download(
        self, name: str, offset: int, append: Callable[[bytes], None], limit: int
    ) -> None:
        """Download a blob from ``offset`` on, over as many links as it takes.

        Args:
            name: sha256 of the blob.
            offset: bytes that are already here.
            append: receives the bytes, in order.
            limit: largest size that the blob may have, in bytes.

        Raises:
            HubError: the hub does not have the blob.
            BundleError: the hub's pieces are no blob of at most ``limit`` bytes.
            LinkClosed: the hub is out of reach for good.
        """
        async with self._downloading:
            download = self._download = Download(BlobRequests(name, offset, limit), append)
            try:
                while not download.requests.done:
                    await self._linked.wait()
                    self.raise_failure()
                    download.event.clear()
                    try:
                        for request in download.requests.due(self._now()):
                            await self.send(request)
                    except (LinkClosed, SessionLost):
                        self.raise_failure()
                        await asyncio.sleep(0.05)
                        continue
                    await download.progress()
            finally:
                self._unwanted += download.requests.open
                self._download = None

    async def _keep_linked(self) -> None:
        """Connect, serve, reconnect with back-off; gives up after ``patience_s`` without a hub."""
        now = asyncio.get_running_loop().time
        lost_at = now()
        delay = 0.1
        while True:
            welcomed, opened_at = self._welcome, now()
            try:
                link = await self._open_link()
                try:
                    await self._serve(link)
                finally:
                    self._linked.clear()
                    await link.close()
                    self._enter(ConnectionEvent.LOST)
                    self._unwanted = 0
                    if self._download is not None:
                        self._download.lost()
            except (LinkClosed, HubError) as error:
                if isinstance(error, HubError) and not error.is_temporary:
                    self._fail(error)
                    break
                # a hub that welcomes and then fails at once does not work yet
                lasted = isinstance(error, LinkClosed) or now() - opened_at >= _LONGEST_PAUSE_S
                if self._welcome is not welcomed and lasted:
                    lost_at, delay = now(), 0.1
                if now() - lost_at + delay > self._patience_s:
                    self._fail(error)
                    break
            except CutlayerError as error:  # trying again would give the same
                self._fail(error)
                break
            except Exception as error:  # a mistake of ours must not leave callers waiting
                self._fail(CutlayerError(f"the connection failed unexpectedly: {error!r}"))
                raise
            await asyncio.sleep(delay * self._jitter.uniform(0.5, 1.0))
            delay = min(delay * 2, _LONGEST_PAUSE_S)
        if self._session is not None:
            await self._session.lose("the connection to the hub was given up")

    async def _serve(self, link: Link) -> None:
        """Handshake on a fresh link, then run the session on it until it breaks."""
        old = self._session
        answer = await self._shake_hands(link, old.channel.settled if old is not None else 0)
        self._welcome = answer
        if old is None or not answer.resumed:
            if old is not None:
                await old.lose("the hub does not know this session any more")
                self._forget_session()
            agreed = frozenset(answer.extensions or ()).intersection(self._extensions)
            self._session = Session(
                Channel(
                    answer.window,
                    peer_max_frame=answer.max_frame,
                    extensions=agreed,
                    peer_max_message=answer.max_message or answer.max_frame,
                )
            )
            self._session_id = answer.session
        session = self._session
        assert session is not None
        self._enter(ConnectionEvent.WELCOME)
        self._linked.set()
        try:
            await session.run(link, answer.last_seq, lambda d: self._handle(session, d))
        except CannotResume as error:
            await session.lose(str(error))
            self._forget_session()
            self._session = self._session_id = None  # the next hello starts over
            raise LinkClosed(str(error)) from error

    async def _shake_hands(self, link: Link, settled: int) -> Welcome:
        """Send ``hello`` and wait for ``welcome``."""
        hello = Hello(
            version=VERSION,
            token=self._token,
            tier=self.tier,
            session=self._session_id,
            last_seq=settled,
            memory_mb=self._memory_mb,
            extensions=self._extensions or None,
        )
        await link.send(encode(hello, 0, 0))
        self._enter(ConnectionEvent.HELLO)
        try:
            async with asyncio.timeout(10):
                answer = decode(await link.receive(), agreed=self._extensions).message
        except TimeoutError:
            raise LinkClosed("the hub did not answer the hello in 10 s") from None
        if isinstance(answer, Error):
            if self._extensions and answer.field == "extensions":
                self._extensions = []  # a hub from before there were any
                raise LinkClosed("the hub knows no extensions; the next hello offers none")
            raise HubError(answer.code, answer.message, answer.field)
        if not isinstance(answer, Welcome):
            raise HubError(ErrorCode.BAD_MESSAGE, f"the hub answered hello with {answer.TYPE}")
        return answer

    def _handle(self, session: Session, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, Round | Evaluate | Move | Stop):
            if isinstance(message, Round):
                self.replies.begin_round(message.round)
            elif isinstance(message, Evaluate | Move):
                self.replies.end_round()
            else:
                self.replies.begin_round(math.inf)
            self._work.put_nowait((session, delivery))
        elif isinstance(message, Answer):
            future = self._answers.get(message.request)
            if future is not None and not future.done():
                future.set_result(message)
            session.settle(delivery.seq)
        elif isinstance(message, Gradient | Features):
            self.replies.deliver(message)
            session.settle(delivery.seq)
        elif isinstance(message, Blob):
            if self._download is None or not self._download.take(message, self._now()):
                self._unwanted = max(self._unwanted - 1, 0)
        elif isinstance(message, Error):
            error = HubError(message.code, message.message, message.field)
            if message.fatal:
                self._linked.clear()  # now: the link may take seconds to close
                raise error
            if message.code == ErrorCode.UNKNOWN_BLOB and self._unwanted:
                self._unwanted -= 1
            elif self._download is not None:
                self._download.fail(error)
        elif delivery.seq:
            session.settle(delivery.seq)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _enter(self, event: ConnectionEvent) -> None:
        self._state = next_connection_state(self._state, event)

    def _wake(self, error: CutlayerError) -> None:
        """Everybody who waits for an answer or a reply gets ``error``."""
        waiting: list[asyncio.Future[Any]] = [*self._answers.values(), *self.replies.pending]
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _forget_session(self) -> None:
        """Everything that waits for the old session ends."""
        lost = SessionLost("the hub does not know this session any more")
        self._wake(lost)
        self.replies.forget()
        while not self._work.empty():
            self._work.get_nowait()
        self._work.put_nowait(lost)

    def _fail(self, error: CutlayerError) -> None:
        """Remember why the connection ended and wake everything that waits."""
        if self._failure is None:
            self._failure = error
        self._enter(ConnectionEvent.FATAL)
        self._linked.set()
        self._wake(error)
        if self._download is not None:
            self._download.fail(error)
        self._work.put_nowait(error)
