"""The gateway: websocket endpoint, handshake, sessions, limits, blobs and traffic accounting."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager

from websockets.asyncio.server import ServerConnection, serve

from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import ConfigError, CutlayerError, LinkClosed, ProtocolError
from edge_sdk.files import why
from edge_sdk.protocol.channel import CannotResume, Channel, Delivery
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.message import EXTENSIONS, PIECES, RELEASE
from edge_sdk.protocol.messages import (
    SUBPROTOCOL,
    VERSION,
    BlobGet,
    Bye,
    Error,
    Hello,
    Message,
    Welcome,
)
from edge_sdk.protocol.release import Running
from edge_sdk.protocol.states import ConnectionState
from edge_sdk.protocol.structure import HELLO_VALUES
from edge_sdk.transport.flow import Backlog, FlowControl, TokenBucket
from edge_sdk.transport.link import Link, WebSocketLink
from edge_sdk.transport.session import Session, SessionLost
from server_hub.concurrency import BackgroundTasks, Effect
from server_hub.gateway.admission import Admission
from server_hub.gateway.blobs import BlobServer
from server_hub.gateway.descriptors import free_descriptors
from server_hub.gateway.door import Connection, Door, serve_options
from server_hub.gateway.limits import HELLO_BYTES, Limits, Listen
from server_hub.gateway.peers import Peer
from server_hub.gateway.releases import Releases
from server_hub.gateway.tokens import Tokens
from server_hub.gateway.traffic import Traffic
from server_hub.logs import plain
from server_hub.methods.plan import ModelOffer

log = logging.getLogger("cutlayer.hub")

_OUTGOING = 4 * 2**20
"""Bytes that may wait to be sent to a device before the hub stops reading what the device sends."""

_LINGER_S = 2.0
"""Seconds that a device has to close its connection after its ``bye``."""

_DISMISSAL_S = 3.0
"""Seconds in which devices learn that the hub ends, before their connections are closed."""


class Gateway:
    """Admits devices and carries their messages.

    Args:
        limits: limits of a peer.
        tokens: tells which device a token belongs to.
        manifests: hash of the manifest by tier; empty without a job.
        store: store of the bundles' blobs; None without a job.
        handle: called with every message that the gateway does not handle itself; must not block.
            It returns the message's effect, or None if the effect is complete at once. The gateway
            sends a :class:`ProtocolError` that it raises to the peer, and ends the session.
        gone: called with the peer and a reason when a session has ended.
        moved: returns the tier that a device has moved to, given the device's name, the tier of its
            token and its memory in MB; None for the tier of the token.
        connection: called when the connection of a session has broken, or is there again; the
            peer's ``lost_at`` says which.
        releases: releases for devices that only download, and without a job for all devices; None
            if there are none.
        extensions: extensions that the hub speaks, with devices that speak them, too.
    """

    def __init__(
        self,
        limits: Limits,
        tokens: Tokens,
        manifests: Mapping[str, str],
        store: BlobStore | None,
        handle: Callable[[Peer, Message], Effect | None],
        gone: Callable[[Peer, str], None],
        moved: Callable[[str, str | None, int | None], str | None],
        connection: Callable[[Peer], None],
        releases: Releases | None = None,
        extensions: Collection[str] = EXTENSIONS,
    ) -> None:
        self._extensions, self._releases = extensions, releases
        self._limits, self._manifests = limits, manifests
        self._admission = Admission(tokens, manifests, moved, releases)
        self._handle, self._gone = handle, gone
        self._connection_changed = connection
        stores = [store, None if releases is None else releases.blobs]
        self.blobs = BlobServer([s for s in stores if s is not None], limits.blob_piece)
        """Serves blobs to devices."""
        self.peers: dict[str, Peer] = {}
        """Peers by device name."""
        self.traffic = Traffic()
        """Bytes by kind of message since the start."""
        self._background = BackgroundTasks()
        self._waiting = Backlog(limits.total_waiting_mb * 2**20)
        self._ending = False

    @asynccontextmanager
    async def listen(self, where: Listen) -> AsyncIterator[str]:
        """Serve websockets while entered; yields the address.

        At the end, devices that are still connected get the temporary error ``busy``: a hub that
        starts again finds them.

        Raises:
            ConfigError: the hub cannot listen there, for example because the port is taken; or the
                system does not let it open files enough.
        """
        room = free_descriptors(self._limits.connections + self._limits.strangers)
        door = Door(self._limits, room, where.trusted)
        try:
            server = await serve(
                self._connection,
                where.host,
                where.port,
                subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
                compression=None,
                close_timeout=2,
                **serve_options(door),
            )
        except (OSError, UnicodeError) as error:
            reason = why(error) if isinstance(error, OSError) else "it is no name of a host"
            raise ConfigError(
                f"cannot listen on {where.bracketed}:{where.port}: {reason}; "
                "choose another port, or 0 for a free one, and an address of this machine for host"
            ) from error
        try:
            port = next(iter(server.sockets)).getsockname()[1]
            async with self.reaping():
                yield f"ws://{where.bracketed}:{port}"
        finally:
            await self._dismiss()
            server.close()
            await server.wait_closed()

    @asynccontextmanager
    async def reaping(self) -> AsyncIterator[None]:
        """End sessions without a link after ``limits.session_s`` seconds, while entered."""
        reaper = asyncio.create_task(self._reap())
        try:
            yield
        finally:
            reaper.cancel()

    async def _dismiss(self) -> None:
        """Tell all devices, and those that come meanwhile, that the hub ends."""
        self._ending = True
        for peer in list(self.peers.values()):
            self.drop(peer, "the hub ends", _ends())
        await self._background.finished(_DISMISSAL_S)

    async def _connection(self, connection: ServerConnection) -> None:
        assert isinstance(connection, Connection)
        await self.serve_link(WebSocketLink(connection), connection.address, connection.admit)

    async def serve_link(
        self, link: Link, origin: str = "memory", admitted: Callable[[], None] = lambda: None
    ) -> None:
        """Serve one link from its ``hello`` to its end.

        Args:
            link: the link.
            origin: address of the peer, for the log.
            admitted: called once the peer has said a valid ``hello``.
        """
        try:
            hello = await self._hello(link)
            peer, resumed = self._admit(hello)
        except LinkClosed:
            return
        except ProtocolError as error:
            log.warning("refused a connection from %s: %s", origin, error)
            await _refuse(link, error)
            return
        admitted()
        agreed, release = peer.session.extensions, peer.release
        number = release.number if release is not None else 0 if peer.download_only else None
        offer = self.blobs.offer(peer.tier) if release is None else ModelOffer()
        welcome = Welcome(
            version=VERSION,
            device=peer.device,
            tier=peer.tier,
            session=peer.session_id,
            resumed=resumed,
            last_seq=peer.session.channel.settled,
            manifest=self._manifests[peer.tier] if release is None else release.manifest,
            window=self._limits.window,
            max_frame=self._limits.max_frame,
            max_message=self._limits.max_message if PIECES in agreed else None,
            extensions=sorted(agreed) or None,
            release=number if RELEASE in agreed else None,
            **vars(offer),
        )
        log.info("%s %s (tier %s)", peer.device, "resumed" if resumed else "joined", peer.tier)
        peer.state, peer.lost_at = ConnectionState.LINKED, None
        self._connection_changed(peer)
        first = encode(welcome, 0, peer.session.channel.settled, agreed)
        try:
            await peer.session.run(
                link, hello.last_seq if resumed else 0, lambda d: self._deliver(peer, d), first
            )
        except LinkClosed:
            if peer.state is ConnectionState.LINKED and not peer.session.linked:
                peer.state = ConnectionState.DISCONNECTED
                peer.lost_at = asyncio.get_running_loop().time()
                self._connection_changed(peer)
        except ProtocolError as error:  # the peer has been told
            self.drop(peer, str(error))

    async def _hello(self, link: Link) -> Hello:
        try:
            async with asyncio.timeout(self._limits.hello_s):
                data = await link.receive()
        except TimeoutError:
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"no hello within {self._limits.hello_s:g} s"
            ) from None
        message = decode(data, HELLO_BYTES, HELLO_VALUES).message
        self.traffic.count(message.TYPE, len(data), 0)
        if not isinstance(message, Hello):
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"the first frame is {message.TYPE}, must be hello"
            )
        return message

    def _admit(self, hello: Hello) -> tuple[Peer, bool]:
        """Return the peer of a ``hello``, and whether its earlier session is resumed.

        Nothing is awaited in between, so that of several connections with one token the last wins.
        """
        if hello.version != VERSION:
            raise ProtocolError(
                ErrorCode.UNSUPPORTED_VERSION,
                f"protocol version {hello.version} is not spoken here, version {VERSION} is",
                "version",
            )
        if self._ending:
            raise _ends()
        found = self._admission.identify(hello)
        device = found.device
        old = self.peers.get(device)
        if old is not None and old.session_id == hello.session and old.is_like(found):
            try:
                old.session.channel.resume(hello.last_seq)
                old.release = found.release  # another one may have been published
                return old, True
            except CannotResume as error:
                log.warning("%s cannot resume: %s", device, error)
        if old is None:
            self._make_room()
        if old is not None:
            if old.session.linked and hello.session != old.session_id:
                # the other connection is that of a second device with the same token, or is dead
                taken = ProtocolError(
                    ErrorCode.REPLACED, f"another connection came with {device}'s token"
                )
                self.drop(old, str(taken), taken)
            else:
                self.drop(old, "the device started over")
        session = self._session(hello, found.download_only)
        peer = Peer(session_id=secrets.token_hex(16), session=session, **vars(found))
        self.peers[device] = peer
        return peer, False

    def _make_room(self) -> None:
        """End the session that has been without a link for longest, if there are too many."""
        if len(self.peers) < self._limits.connections:
            return
        away = [(peer.lost_at, device) for device, peer in self.peers.items() if peer.lost_at]
        if not away:
            raise ProtocolError(ErrorCode.BUSY, "the hub has no connections left; try later")
        self.drop(self.peers[min(away)[1]], "another device needs the place")

    def _session(self, hello: Hello, download_only: bool) -> Session:
        limits = self._limits
        agreed = frozenset(hello.extensions or ()).intersection(self._extensions)
        if download_only:
            agreed &= {RELEASE}  # the others are for what the device may not do
        if not limits.takes_pieces:
            agreed -= {PIECES}
        flow = FlowControl(
            Backlog(_OUTGOING, self._waiting),
            Backlog(limits.waiting_mb * 2**20, self._waiting, lambda: self._give_up(session)),
            TokenBucket(limits.frames_per_s, 2 * limits.frames_per_s),
        )
        channel = Channel(
            limits.window, limits.max_frame, extensions=agreed, max_message=limits.max_message
        )
        session = Session(channel, self.traffic.count, flow)
        return session

    def _give_up(self, session: Session) -> None:
        """End a session whose unfinished message takes the memory that others wait for."""
        for peer in [peer for peer in self.peers.values() if peer.session is session]:
            error = ProtocolError(
                ErrorCode.BUSY, "the hub needs the memory of a message that does not go on"
            )
            self.drop(peer, str(error), error)

    def _deliver(self, peer: Peer, delivery: Delivery) -> None:
        """Act on a message. This is the only place that settles messages."""
        message = delivery.message
        if self.peers.get(peer.device) is not peer:
            return  # the session has ended, and its link is still open
        if isinstance(message, BlobGet):
            peer.session.post(self.blobs.piece(message))
        elif isinstance(message, Bye):
            peer.session.settle(delivery.seq)
            self.drop(peer, f"left: {plain(message.reason)}", linger_s=_LINGER_S)
        elif isinstance(message, Error):
            self._check_notes(peer, message)
            log.warning("%s reports: %s", peer.device, message.message)
        elif isinstance(message, Running):
            self._check_notes(peer, message)
            self._note(peer, message)
            peer.session.settle(delivery.seq)
        elif message.TYPE not in _IGNORED:
            if peer.download_only:
                raise ProtocolError(
                    ErrorCode.BAD_MESSAGE,
                    f"{peer.device}'s token only downloads; {message.TYPE} needs another one",
                )
            effect = self._effect_of(peer, message)
            if effect is None:
                peer.session.settle(delivery.seq)
            else:
                effect.when_complete(lambda: peer.session.settle(delivery.seq))

    def _check_notes(self, peer: Peer, message: Message) -> None:
        """Raise if a device sends more messages that are kept than its budget allows."""
        if not peer.notes.try_take(asyncio.get_running_loop().time()):
            raise ProtocolError(ErrorCode.BAD_MESSAGE, f"the device sends {message.TYPE} too often")

    def _note(self, peer: Peer, said: Running) -> None:
        """Keep what a device says that it runs."""
        if said.refused is not None:
            log.warning("%s refuses a release: %s", peer.device, plain(said.reason or ""))
        if self._releases is not None:
            try:
                self._releases.note(peer.device, peer.tier, said)
            except ConfigError as error:
                log.error("what %s runs is not kept: %s", peer.device, error)

    def _effect_of(self, peer: Peer, message: Message) -> Effect | None:
        """Have a message handled; a failure of the hub ends this session and nothing else."""
        try:
            return self._handle(peer, message)
        except CutlayerError:
            raise
        except Exception as error:
            log.exception("cannot handle %s of %s", message.TYPE, peer.device)
            raise ProtocolError(
                ErrorCode.INTERNAL, f"the hub failed at {message.TYPE}; try later"
            ) from error

    def post(self, peer: Peer, message: Message) -> None:
        """Send a message to a device, or keep it until the device has a link again.

        A device that leaves too many messages unsettled is dropped.
        """
        try:
            peer.session.post(message)
        except ProtocolError as error:
            self.drop(peer, str(error), error)
        except SessionLost:
            pass

    def drop(
        self,
        peer: Peer,
        reason: str,
        error: ProtocolError | None = None,
        linger_s: float = 0.0,
    ) -> None:
        """End a session, whatever the reason, and close its link. Twice is as good.

        Args:
            peer: the peer.
            reason: why the session ends, for the log and the rounds.
            error: sent to the device first, if given.
            linger_s: seconds that the device has to close the link itself.
        """
        if peer.state is ConnectionState.ENDED:
            return
        peer.state = ConnectionState.ENDED
        if linger_s:
            log.info("%s %s", peer.device, reason)
        else:
            log.warning("dropped %s (tier %s): %s", peer.device, peer.tier, reason)
            peer.session.end(reason)
        self._background.spawn(self._close(peer, reason, error, linger_s))
        if self.peers.get(peer.device) is peer:
            del self.peers[peer.device]
            self._gone(peer, reason)

    async def _close(
        self, peer: Peer, reason: str, error: ProtocolError | None, linger_s: float
    ) -> None:
        deadline = asyncio.get_running_loop().time() + linger_s
        while peer.session.linked and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
        await peer.session.lose(reason, error)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.session_s / 4))
            now = asyncio.get_running_loop().time()
            for peer in list(self.peers.values()):
                if peer.lost_at is not None and now - peer.lost_at > self._limits.session_s:
                    self.drop(peer, f"no connection for {now - peer.lost_at:.0f} s")


_IGNORED = ("ack", "hello")
"""Types of messages without an effect of their own."""


def _ends() -> ProtocolError:
    """What devices hear when the hub ends: temporary, so that they come back to the next one."""
    return ProtocolError(ErrorCode.BUSY, "the hub ends, or starts again; try later")


async def _refuse(link: Link, error: ProtocolError) -> None:
    message = Error(code=error.code, message=str(error)[:4096], fatal=True, field=error.field)
    try:
        async with asyncio.timeout(5):
            await link.send(encode(message, 0, 0))
        await link.close()
    except (CutlayerError, TimeoutError):
        pass
