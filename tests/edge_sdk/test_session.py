"""Sessions over links that break: back-pressure, resuming, and the ends of a session."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from edge_sdk.errors import ConfigError, LinkClosed, ProtocolError
from edge_sdk.protocol.channel import CannotResume, Channel, Delivery
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.messages import (
    SUBPROTOCOL,
    Ack,
    BlobGet,
    Decline,
    Error,
    Hello,
    Message,
    Welcome,
)
from edge_sdk.transport.link import Link, MemoryLink, WebSocketLink, open_websocket
from edge_sdk.transport.session import Session, SessionLost
from tests.lib.tasks import run

HASH = "0" * 64


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():
        await asyncio.sleep(0.001)


async def settled_down() -> None:
    """Run all tasks that can run without waiting for time to pass."""
    for _ in range(50):
        await asyncio.sleep(0)


def numbered(number: int) -> Decline:
    """Return a reliable message with a number."""
    return Decline(number, "")


class Inbox:
    """A handler that records the numbers it receives, and settles them if told to."""

    def __init__(self, session: Session, settle: bool = True) -> None:
        self.session, self.settle = session, settle
        self.got: list[int] = []
        self.others: list[Message] = []

    def __call__(self, delivery: Delivery) -> None:
        if isinstance(delivery.message, Decline):
            assert delivery.seq > 0
            self.got.append(delivery.message.round)
            if self.settle:
                self.session.settle(delivery.seq)
        elif not isinstance(delivery.message, Ack):
            self.others.append(delivery.message)


@contextlib.asynccontextmanager
async def websocket_pair() -> AsyncIterator[list[Link]]:
    """Open both ends of a real WebSocket."""
    there: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def keep(connection: ServerConnection) -> None:
        there.set_result(WebSocketLink(connection))
        await connection.wait_closed()

    async with serve(
        keep,
        "127.0.0.1",
        0,
        subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        compression=None,
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield [await open_websocket(f"ws://127.0.0.1:{port}"), await there]


class Sides:
    """Two sessions and the links between them."""

    def __init__(self, window: int, settle: bool = True) -> None:
        self.a, self.b = Session(Channel(window)), Session(Channel(window))
        self.at_a, self.at_b = Inbox(self.a), Inbox(self.b, settle)
        self.tasks: list[asyncio.Task[None]] = []
        self.links: list[Link] = []

    async def link(self, links: list[Link] | None = None) -> None:
        """Connect both sides, with links in memory unless others are given."""
        self.links = links or list(MemoryLink.pair())
        settled = self.a.channel.settled, self.b.channel.settled
        self.tasks = [
            asyncio.create_task(self.a.run(self.links[0], settled[1], self.at_a)),
            asyncio.create_task(self.b.run(self.links[1], settled[0], self.at_b)),
        ]
        await settled_down()
        assert self.a.linked
        assert self.b.linked

    async def cut(self) -> None:
        """Break the link; both sides must report it."""
        for link in self.links:
            await link.close()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [LinkClosed, LinkClosed]
        assert not self.a.linked
        assert not self.b.linked


# --- back-pressure ------------------------------------------------------------------------------


def test_a_sender_waits_while_the_window_is_full_and_wakes_upon_an_ack() -> None:
    async def test() -> None:
        sides = Sides(window=3, settle=False)
        await sides.link()
        sent: list[int] = []

        async def send_all() -> None:
            for number in range(1, 7):
                await sides.a.send(numbered(number))
                sent.append(number)

        sender = asyncio.create_task(send_all())
        await settled_down()
        assert sent == sides.at_b.got == [1, 2, 3]
        with pytest.raises(ProtocolError) as caught:
            sides.a.post(numbered(9))
        assert caught.value.code == ErrorCode.WINDOW_EXCEEDED
        sides.a.post(BlobGet(HASH, 0))  # unreliable messages do not need room in the window
        sides.b.settle(2)
        await settled_down()
        assert sent == [1, 2, 3], "2 is settled, 1 is not: there is no room yet"
        sides.b.settle(1)
        await settled_down()
        assert sent == sides.at_b.got == [1, 2, 3, 4, 5]
        assert sides.at_b.others == [BlobGet(HASH, 0)]
        for seq in (3, 4, 5):
            sides.b.settle(seq)
        await sender
        await until(lambda: sides.at_b.got == [1, 2, 3, 4, 5, 6])
        sides.b.settle(6)
        await until(lambda: sides.a.channel.unacked == 0)
        await sides.cut()

    run(test())


def test_many_senders_share_one_window() -> None:
    async def test() -> None:
        sides = Sides(window=2)
        await sides.link()
        await asyncio.gather(*(sides.a.send(numbered(n)) for n in range(1, 101)))
        await until(lambda: sides.a.channel.unacked == 0)
        assert sorted(sides.at_b.got) == list(range(1, 101))
        await sides.cut()

    run(test())


def test_an_ack_is_not_lost_behind_a_frame_that_was_made_before_it() -> None:
    """The reply is encoded before the message is settled; both happen before anything is sent."""

    async def test() -> None:
        sides = Sides(window=1)

        def reply_then_settle(delivery: Delivery) -> None:
            if delivery.seq:
                sides.b.post(BlobGet(HASH, delivery.seq))
                sides.b.settle(delivery.seq)

        sides.at_b = reply_then_settle  # type: ignore[assignment]
        await sides.link()
        for number in range(1, 6):
            await asyncio.wait_for(sides.a.send(numbered(number)), 2)
        await until(lambda: sides.a.channel.unacked == 0)
        await until(lambda: len(sides.at_a.others) == 5)
        await sides.cut()

    run(test())


def test_what_was_settled_without_a_link_is_told_over_the_next_one() -> None:
    async def test() -> None:
        sides = Sides(window=1, settle=False)
        await sides.link()
        await sides.a.send(numbered(1))
        await until(lambda: sides.at_b.got == [1])
        await sides.cut()
        told = sides.b.channel.settled
        sides.b.settle(1)  # this is after its hello
        here, there = MemoryLink.pair()
        tasks = [
            asyncio.create_task(sides.a.run(here, told, sides.at_a)),
            asyncio.create_task(sides.b.run(there, 0, sides.at_b)),
        ]
        await asyncio.wait_for(sides.a.send(numbered(2)), 2)
        await until(lambda: sides.at_b.got == [1, 2])
        sides.links, sides.tasks = [here, there], tasks
        await sides.cut()

    run(test())


# --- links that break ---------------------------------------------------------------------------


def test_without_a_link_reliable_messages_wait_and_others_are_dropped() -> None:
    async def test() -> None:
        sides = Sides(window=4)
        for number in (1, 2):
            sides.a.post(numbered(number))
            sides.a.post(BlobGet(HASH, number))
        await sides.link()
        await until(lambda: sides.at_b.got == [1, 2])
        sides.a.post(BlobGet(HASH, 3))
        await until(lambda: sides.at_b.others == [BlobGet(HASH, 3)])
        await sides.cut()

    run(test())


class LossyLink:
    """A link that drops everything after ``life`` frames, like a dead network."""

    def __init__(self, inner: Link, life: int, dead: asyncio.Event) -> None:
        self._inner, self._life, self._dead = inner, life, dead

    async def send(self, frame: bytes) -> None:
        self._life -= 1
        if self._life < 0:
            self._dead.set()
            await asyncio.sleep(0)
        else:
            await self._inner.send(frame)

    async def receive(self) -> bytes | str:
        return await self._inner.receive()

    async def close(self) -> None:
        await self._inner.close()


class SlowInbox(Inbox):
    """A handler that settles at once, or a little later and out of order."""

    def __init__(self, session: Session, rng: random.Random) -> None:
        super().__init__(session, settle=False)
        self._rng = rng

    def __call__(self, delivery: Delivery) -> None:
        super().__call__(delivery)
        if delivery.seq and self._rng.random() < 0.5:
            self.session.settle(delivery.seq)
        elif delivery.seq:
            loop = asyncio.get_running_loop()
            loop.call_later(self._rng.random() * 0.003, self.session.settle, delivery.seq)


class Exchange:
    """Both sides send ``count`` numbered messages; each must arrive once and in order."""

    def __init__(self, seed: int, count: int) -> None:
        self.rng, self.count = random.Random(seed), count
        window = self.rng.randint(1, 8)
        self.a, self.b = Session(Channel(window)), Session(Channel(window))
        self.at_a, self.at_b = SlowInbox(self.a, self.rng), SlowInbox(self.b, self.rng)
        self.cuts = 0

    async def send_all(self, session: Session) -> None:
        """Send the messages of one side, with some unreliable ones in between."""
        for number in range(1, self.count + 1):
            await session.send(numbered(number))
            if self.rng.random() < 0.2:
                session.post(BlobGet(HASH, number))
            if self.rng.random() < 0.2:
                await asyncio.sleep(0)

    @property
    def done(self) -> bool:
        """Return whether everything arrived and both sides know it."""
        return (
            len(self.at_a.got) == len(self.at_b.got) == self.count
            and self.a.channel.unacked == self.b.channel.unacked == 0
        )

    @contextlib.contextmanager
    def senders(self) -> Iterator[None]:
        """Send from both sides; check at the end that everything arrived."""
        tasks = [asyncio.create_task(self.send_all(s)) for s in (self.a, self.b)]
        yield
        assert all(task.done() for task in tasks)
        expected = list(range(1, self.count + 1))
        assert self.at_a.got == expected
        assert self.at_b.got == expected
        assert self.cuts >= 5, "the links must have broken"


@pytest.mark.parametrize("seed", range(6))
def test_everything_arrives_once_and_in_order_over_links_in_memory_that_die(seed: int) -> None:
    async def test() -> None:
        exchange = Exchange(seed, count=200)
        rng = exchange.rng
        with exchange.senders():
            while not exchange.done:
                dead = asyncio.Event()
                pair = MemoryLink.pair()
                links = [LossyLink(end, rng.randint(0, 60), dead) for end in pair]
                settled = exchange.a.channel.settled, exchange.b.channel.settled
                runs = [
                    asyncio.create_task(exchange.a.run(links[0], settled[1], exchange.at_a)),
                    asyncio.create_task(exchange.b.run(links[1], settled[0], exchange.at_b)),
                ]
                finished = asyncio.create_task(until(lambda: exchange.done))
                died = asyncio.create_task(dead.wait())
                await asyncio.wait([finished, died], return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(rng.random() * 0.003)
                finished.cancel()
                died.cancel()
                for link in links:
                    await link.close()
                ends = await asyncio.gather(*runs, return_exceptions=True)
                assert [type(end) for end in ends] == [LinkClosed, LinkClosed]
                exchange.cuts += 1

    run(test())


class AbandonedLink(WebSocketLink):
    """A link that its owner does not close after use, so that the peer does not notice."""

    async def close(self) -> None:
        return


@pytest.mark.parametrize("seed", range(3))
def test_everything_arrives_once_and_in_order_over_websockets_that_break(seed: int) -> None:
    async def test() -> None:
        exchange = Exchange(seed, count=300)
        rng = exchange.rng
        at_hub: list[ServerConnection] = []

        async def hub(connection: ServerConnection) -> None:
            at_hub.append(connection)
            link = WebSocketLink(connection)
            with contextlib.suppress(LinkClosed):
                hello = decode(await link.receive()).message
                assert isinstance(hello, Hello)
                settled = exchange.b.channel.settled
                welcome = Welcome(
                    1, "d", "t", "s", True, settled, HASH, exchange.b.channel.window, 2**20
                )
                first = encode(welcome, 0, settled)
                await exchange.b.run(link, hello.last_seq, exchange.at_b, first)

        async def device(url: str) -> None:
            connection = await connect(
                url,
                subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
                compression=None,
            )
            how = rng.choice(["abort here", "abort there", "close", "abandon"])
            link = (AbandonedLink if how == "abandon" else WebSocketLink)(connection)
            settled = exchange.a.channel.settled
            await link.send(encode(Hello(1, "t", "s", "s", settled), 0, 0))
            welcome = decode(await link.receive()).message
            assert isinstance(welcome, Welcome), "the welcome comes before everything else"
            serving = asyncio.create_task(exchange.a.run(link, welcome.last_seq, exchange.at_a))
            await asyncio.wait([serving], timeout=rng.random() * 0.02)
            if how == "abort here":
                connection.transport.abort()
            elif how == "abort there":
                at_hub[-1].transport.abort()
            elif how == "close":
                await connection.close()
            else:
                serving.cancel()
            with contextlib.suppress(LinkClosed, asyncio.CancelledError):
                await serving
            exchange.cuts += 1

        async with serve(
            hub,
            "127.0.0.1",
            0,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
        ) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            with exchange.senders():
                while not exchange.done:
                    with contextlib.suppress(LinkClosed):
                        await device(f"ws://127.0.0.1:{port}")

    run(test())


class StuckLink(LossyLink):
    """A link to a peer that is gone: sends wait for ever, and nobody closes the link."""

    async def send(self, frame: bytes) -> None:
        await asyncio.Event().wait()


def test_a_new_link_takes_over_from_one_that_is_stuck() -> None:
    async def test() -> None:
        sides = Sides(window=8)
        end, other_end = MemoryLink.pair()
        stuck = StuckLink(end, 0, asyncio.Event())
        old = asyncio.create_task(sides.a.run(stuck, 0, sides.at_a))
        await settled_down()
        for number in (1, 2, 3):
            sides.a.post(numbered(number))
        await settled_down()
        here, there = MemoryLink.pair()
        welcome = encode(Welcome(1, "d", "t", "s", True, 0, HASH, 8, 2**20), 0, 0)
        new = asyncio.create_task(sides.a.run(here, 0, sides.at_a, welcome))
        assert await there.receive() == welcome, "nothing goes before the welcome"
        serving = asyncio.create_task(sides.b.run(there, 0, sides.at_b))
        sides.a.post(numbered(4))
        await until(lambda: sides.at_b.got == [1, 2, 3, 4])
        await other_end.send(encode(numbered(7), 1, 0))
        await other_end.close()
        with pytest.raises(LinkClosed):
            await old
        assert sides.at_a.got == [], "what comes over the old link is too late"
        assert sides.a.linked
        sides.a.post(numbered(5))
        await until(lambda: sides.at_b.got == [1, 2, 3, 4, 5])
        sides.links, sides.tasks = [here, there], [new, serving]
        await sides.cut()

    run(test())


# --- ends of links and sessions -----------------------------------------------------------------


def test_losing_a_session_wakes_the_senders_and_ends_the_link() -> None:
    async def test() -> None:
        async with websocket_pair() as links:
            sides = Sides(window=2, settle=False)
            await sides.link(links)
            senders = [asyncio.create_task(sides.a.send(numbered(n))) for n in range(1, 6)]
            await until(lambda: sides.at_b.got == [1, 2])
            assert [task.done() for task in senders] == [True, True, False, False, False]
            await sides.a.lose("the hub forgot us")
            ends = await asyncio.gather(*senders, return_exceptions=True)
            assert ends[:2] == [None, None]
            assert [type(end) for end in ends[2:]] == [SessionLost] * 3
            assert str(ends[2]) == "the hub forgot us"
            for runs in sides.tasks:
                with pytest.raises(LinkClosed):
                    await runs
            assert not sides.a.linked
            with pytest.raises(SessionLost):
                sides.a.post(numbered(6))
            with pytest.raises(SessionLost):
                await sides.a.send(BlobGet(HASH, 0))

    run(test())


async def refusal(session: Session, frame: bytes | str, last_seq: int = 0) -> tuple[object, Error]:
    """Return the error that a session raises for a frame, and the error that it sends the peer."""
    here, there = MemoryLink.pair()
    serving = asyncio.create_task(session.run(here, last_seq, Inbox(session)))
    await there.send(frame)  # type: ignore[arg-type]
    with pytest.raises((ProtocolError, LinkClosed)) as caught:
        await serving
    told = decode(await there.receive()).message
    assert isinstance(told, Error)
    with pytest.raises(LinkClosed):
        await there.receive()
    assert not session.linked
    return caught.value, told


def test_a_peer_is_told_what_it_did_wrong() -> None:
    async def test() -> None:
        error, told = await refusal(Session(Channel()), encode(Ack(), 1, 0))
        assert isinstance(error, ProtocolError)
        assert (told.code, told.field, told.fatal) == ("bad_frame", "seq", True)
        assert told.message == str(error)
        error, told = await refusal(Session(Channel()), "text")
        assert (told.code, told.field, told.fatal) == ("bad_frame", None, True)

    run(test())


def test_a_gap_ends_the_link_and_not_the_session() -> None:
    async def test() -> None:
        sides = Sides(window=8)
        error, told = await refusal(sides.b, encode(numbered(2), 2, 0))
        assert isinstance(error, LinkClosed)
        assert (told.code, told.field, told.fatal) == ("sequence_gap", "seq", False)
        for number in (1, 2):
            sides.a.post(numbered(number))
        await sides.link()
        await until(lambda: sides.at_b.got == [1, 2])
        await sides.cut()

    run(test())


def test_a_peer_that_cannot_resume_is_told() -> None:
    async def test() -> None:
        session = Session(Channel())
        error, told = await refusal(session, encode(Ack(), 0, 0), last_seq=5)
        assert isinstance(error, CannotResume)
        assert (told.code, told.fatal) == ("cannot_resume", True)

    run(test())


def test_every_frame_is_counted() -> None:
    async def test() -> None:
        counted: list[tuple[str, int, int]] = []
        sides = Sides(window=8)
        sides.a = Session(Channel(8), lambda kind, up, down: counted.append((kind, up, down)))
        sides.at_a = Inbox(sides.a)
        await sides.link()
        sides.a.post(numbered(1))
        await until(lambda: sides.a.channel.unacked == 0)
        size = len(encode(numbered(1), 1, 0))
        assert counted == [("decline", 0, size), ("ack", len(encode(Ack(), 0, 1)), 0)]
        await sides.cut()

    run(test())


# --- WebSockets ---------------------------------------------------------------------------------


def test_opening_a_websocket() -> None:
    async def test() -> None:
        seen: list[ServerConnection] = []

        async def echo(connection: ServerConnection) -> None:
            seen.append(connection)
            link = WebSocketLink(connection)
            with contextlib.suppress(LinkClosed):
                while True:
                    frame = await link.receive()
                    assert isinstance(frame, bytes)
                    await link.send(frame)

        async with serve(
            echo,
            "127.0.0.1",
            0,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        ) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            link = await open_websocket(f"ws://127.0.0.1:{port}")
            await link.send(b"one")
            assert await link.receive() == b"one"
            assert seen[0].subprotocol == SUBPROTOCOL
            assert seen[0].protocol.extensions == [], "frames are not compressed"
            await link.close()
            await link.close()
            for use in (link.receive, lambda: link.send(b"two")):
                with pytest.raises(LinkClosed):
                    await use()
        with pytest.raises(LinkClosed, match="cannot connect"):
            await open_websocket(f"ws://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="not a websocket address"):
            await open_websocket("http://127.0.0.1")

    run(test())


def test_a_server_of_another_protocol() -> None:
    async def test() -> None:
        async def other(connection: ServerConnection) -> None:
            await connection.wait_closed()

        async with serve(other, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            with pytest.raises(LinkClosed, match="does not speak"):
                await open_websocket(f"ws://127.0.0.1:{port}")

    run(test())


def test_a_frame_over_the_limit_closes_the_websocket() -> None:
    async def test() -> None:
        async def big(connection: ServerConnection) -> None:
            with contextlib.suppress(LinkClosed):
                await WebSocketLink(connection).send(bytes(2000))
            await connection.wait_closed()

        async with serve(
            big,
            "127.0.0.1",
            0,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        ) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            link = await open_websocket(f"ws://127.0.0.1:{port}", max_frame=1999)
            with pytest.raises(LinkClosed, match="1009"):
                await link.receive()

    run(test())
