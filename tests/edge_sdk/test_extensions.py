"""Extensions: what both sides agree on travels, and nothing else does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import LinkClosed, ProtocolError
from edge_sdk.protocol import checks
from edge_sdk.protocol.channel import Channel
from edge_sdk.protocol.checks import checked
from edge_sdk.protocol.frames import decode, encode
from edge_sdk.protocol.message import EXTENSIONS
from edge_sdk.protocol.messages import MESSAGES, VERSION, Error, Hello, Message, Welcome
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.link import Link, MemoryLink
from server_hub.gateway.limits import Limits
from server_hub.gateway.server import Gateway
from tests.lib.probe import PROBE, Noted, Probe, probing
from tests.lib.specification import rows, section
from tests.lib.tasks import run

HASH = "0" * 64


@pytest.fixture(autouse=True)
def _probing() -> Iterator[None]:
    with probing():
        yield


# --- what is declared ---------------------------------------------------------------------------


def declared() -> set[str]:
    """The extensions that messages and fields belong to."""
    found = set()
    for cls in MESSAGES.values():
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        found |= {cls.EXTENSION, *(f.metadata["extension"] for f in fields)}
    return found - {None, PROBE}  # type: ignore[return-value]


def test_what_is_declared_is_offered_and_specified() -> None:
    assert declared() == set(EXTENSIONS)
    assert [row[0].strip("`") for row in rows(section("Extensions"))] == list(EXTENSIONS)


def test_a_field_of_an_extension_needs_a_default() -> None:
    with pytest.raises(TypeError, match="needs a default"):
        checked(checks.flag, extension=PROBE)


# --- frames and channels ------------------------------------------------------------------------

OF_EXTENSION = [Probe(3), Noted("a", "b"), Noted("a", None, 0.25), Noted("a", "b", 1)]

notes = st.builds(Noted, st.text(max_size=9), st.none() | st.text(max_size=9), st.floats(0, 1))
names = st.lists(st.text(min_size=1, max_size=9) | st.just(PROBE), max_size=4, unique=True)


@pytest.mark.parametrize("message", OF_EXTENSION, ids=str)
def test_what_was_agreed_travels(message: Message) -> None:
    assert decode(encode(message, 1, 0, {PROBE}), agreed={PROBE}).message == message


@pytest.mark.parametrize("agreed", [(), ("other",), ("probe2", "Probe")])
@pytest.mark.parametrize("message", OF_EXTENSION, ids=str)
def test_what_was_not_agreed_is_neither_sent_nor_understood(
    message: Message, agreed: Collection[str]
) -> None:
    """A receiver treats it as something that does not exist."""
    with pytest.raises(ProtocolError, match="the extension 'probe'"):
        encode(message, 1, 0, agreed)
    forced = encode(message, 1, 0, {PROBE})
    with pytest.raises(ProtocolError) as caught:
        decode(forced, agreed=agreed)
    of_a_message = message.TYPE == "probe"
    assert caught.value.code == ("unknown_type" if of_a_message else "bad_message")
    if not of_a_message:
        assert caught.value.field in ("note", "weight")


@given(message=notes, agreed=names)
def test_a_field_travels_exactly_where_it_was_agreed_or_says_nothing(
    message: Noted, agreed: list[str]
) -> None:
    silent = message.note is None and message.weight == 0.5
    channels = [Channel(extensions=frozenset(agreed)) for _ in range(2)]
    if silent or PROBE in agreed:
        delivery = channels[1].receive(channels[0].send(message))
        assert delivery is not None
        assert delivery.message == message
    else:
        with pytest.raises(ProtocolError):
            channels[0].send(message)
        assert channels[0].unacked == 0, "nothing has changed"
    if silent:
        plain = msgpack.packb(["noted", 1, 0, {"text": message.text}])
        assert Channel(extensions=frozenset(agreed)).send(message) == plain


def test_a_channel_keeps_what_was_agreed_over_a_break_and_a_restart() -> None:
    mine, theirs = (Channel(extensions=frozenset({PROBE})) for _ in range(2))
    mine.send(Probe(1))
    mine.send(Noted("a", "b"))
    restored = Channel.restore(mine.snapshot())
    for channel in (mine, restored):
        assert [d.message for f in channel.resume(0) if (d := theirs.receive(f))] in (
            [Probe(1), Noted("a", "b")],
            [],
        )
    assert restored.extensions == mine.extensions
    restored.send(Probe(2))


# --- a device and a hub -------------------------------------------------------------------------


class AnyToken:
    """Every token is that of the device of its name."""

    def device_of(self, token: str) -> str:
        return token

    def tier_of(self, device: str) -> str:
        return "small"

    def is_download_only(self, device: str) -> bool:
        return False


def gateway(folder: Path, extensions: Collection[str]) -> Gateway:
    """A gateway that speaks some extensions; messages have no effect."""
    return Gateway(
        Limits(),
        AnyToken(),
        {"small": HASH},
        BlobStore(folder),
        lambda peer, message: None,
        lambda peer, reason: None,
        lambda device, issued, memory: None,
        lambda peer: None,
        extensions=extensions,
    )


async def welcomed(hub: Gateway, hello: Hello) -> tuple[Link, bytes]:
    """Say hello to a hub; returns the link and the frame of its welcome."""
    mine, theirs = MemoryLink.pair()
    asyncio.get_running_loop().create_task(hub.serve_link(theirs))
    await mine.send(encode(hello, 0, 0))
    frame = await mine.receive()
    assert isinstance(frame, bytes)
    return mine, frame


@pytest.mark.parametrize(
    ("offered", "spoken", "agreed"),
    [
        (None, [PROBE], None),
        ([], [PROBE], None),
        (["unheard of"], [PROBE], None),
        ([PROBE], [], None),
        (["unheard of", PROBE], ["x", PROBE], [PROBE]),
        (["x", PROBE], [PROBE, "x", "y"], [PROBE, "x"]),
    ],
)
def test_a_hub_agrees_on_what_both_sides_speak(
    tmp_path: Path, offered: list[str] | None, spoken: list[str], agreed: list[str] | None
) -> None:
    """A hello that offers nothing known gets a welcome without the field."""

    async def main() -> None:
        hub = gateway(tmp_path, spoken)
        _, frame = await welcomed(hub, Hello(VERSION, "phone", extensions=offered))
        body = msgpack.unpackb(frame)[3]
        assert body.get("extensions") == agreed
        assert ("extensions" in body) == (agreed is not None)
        assert hub.peers["phone"].session.extensions == set(agreed or ())

    run(main())


def test_the_welcome_of_a_device_without_extensions_has_the_bytes_of_old(tmp_path: Path) -> None:
    async def main() -> None:
        _, frame = await welcomed(gateway(tmp_path, [PROBE]), Hello(VERSION, "phone"))
        session = msgpack.unpackb(frame)[3]["session"]
        old = {
            "version": 1, "device": "phone", "tier": "small", "session": session,
            "resumed": False, "last_seq": 0, "manifest": HASH, "window": Limits().window,
            "max_frame": Limits().max_frame,
        }  # fmt: skip
        assert frame == msgpack.packb(["welcome", 0, 0, old])

    run(main())


def test_what_was_agreed_holds_when_a_session_is_resumed(tmp_path: Path) -> None:
    async def main() -> None:
        hub = gateway(tmp_path, [PROBE])
        link, frame = await welcomed(hub, Hello(VERSION, "phone", extensions=[PROBE]))
        session = decode(frame).message.session  # type: ignore[attr-defined]
        await link.close()
        hello = Hello(VERSION, "phone", session=session, extensions=["other"])
        link, frame = await welcomed(hub, hello)
        welcome = decode(frame).message
        assert isinstance(welcome, Welcome)
        assert (welcome.resumed, welcome.extensions) == (True, [PROBE])
        await link.send(encode(Probe(1), 1, 0, [PROBE]))
        ack = await link.receive()
        assert msgpack.unpackb(ack)[:3] == ["ack", 0, 1]

    run(main())


@pytest.mark.parametrize(
    ("message", "code"), [(Probe(1), "unknown_type"), (Noted("a", "b"), "bad_message")]
)
def test_a_hub_refuses_what_was_not_agreed(tmp_path: Path, message: Message, code: str) -> None:
    async def main() -> None:
        link, _ = await welcomed(gateway(tmp_path, [PROBE]), Hello(VERSION, "phone"))
        await link.send(encode(message, 1, 0, [PROBE]))
        error = decode(await link.receive()).message  # type: ignore[arg-type]
        assert isinstance(error, Error)
        assert (error.code, error.fatal) == (code, True)

    run(main())


def test_a_hub_does_not_send_what_was_not_agreed(tmp_path: Path) -> None:
    """It loses this device, which may come again, and no other."""

    async def main() -> None:
        hub = gateway(tmp_path, [PROBE])
        link, _ = await welcomed(hub, Hello(VERSION, "phone"))
        other, _ = await welcomed(hub, Hello(VERSION, "tablet", extensions=[PROBE]))
        for peer in list(hub.peers.values()):
            hub.post(peer, Probe(1))
        assert decode(await other.receive(), agreed=[PROBE]).message == Probe(1)
        error = decode(await link.receive()).message
        assert isinstance(error, Error)
        assert error.code == "internal"
        assert list(hub.peers) == ["tablet"]

    run(main())


def connection(hub: Gateway, extensions: Collection[str]) -> Connection:
    """A device's connection to a gateway in this process."""

    async def open_link() -> Link:
        mine, theirs = MemoryLink.pair()
        asyncio.get_running_loop().create_task(hub.serve_link(theirs))
        return mine

    return Connection(open_link, token="phone", tier=None, patience_s=5, extensions=extensions)


def test_a_device_and_a_hub_agree(tmp_path: Path) -> None:
    """Also after the link has broken."""

    async def main() -> None:
        hub = gateway(tmp_path, [PROBE, "x"])
        device = connection(hub, [PROBE, "y"])
        for _ in range(2):
            welcome = await (device.renew() if device.linked else device.open())
            assert welcome.extensions == [PROBE]
            assert device.extensions == {PROBE}
            await device.send(Probe(1))
        await device.close("done")
        silent = connection(hub, [])
        assert (await silent.open()).extensions is None
        with pytest.raises(ProtocolError, match="does not speak"):
            await silent.send(Probe(1))
        await silent.close("done")

    run(main())


def test_a_device_uses_nothing_that_it_did_not_offer() -> None:
    """Even if a hub names it."""

    async def open_link() -> Link:
        mine, theirs = MemoryLink.pair()
        welcome = Welcome(VERSION, "p", "small", "s", False, 0, HASH, 8, 2**20, extensions=["x"])
        await theirs.send(encode(welcome, 0, 0))
        return mine

    async def main() -> None:
        device = Connection(open_link, token="phone", tier=None, patience_s=5, extensions=[PROBE])
        await device.open()
        assert device.extensions == set()

    run(main())


def test_a_device_joins_a_hub_from_before_there_were_extensions() -> None:
    """Such a hub refuses the field; the device says hello again, without it."""
    hellos: list[dict[str, Any]] = []

    async def old_hub(link: Link) -> None:
        hello = msgpack.unpackb(await link.receive())[3]
        hellos.append(hello)
        if "extensions" in hello:
            error = Error("bad_message", "hello has no field 'extensions'", True, "extensions")
            await link.send(encode(error, 0, 0))
        else:
            welcome = Welcome(VERSION, "p", "small", "s", False, 0, HASH, 8, 2**20)
            await link.send(encode(welcome, 0, 0))
            try:
                await link.receive()
            except LinkClosed:
                return
        await link.close()

    async def open_link() -> Link:
        mine, theirs = MemoryLink.pair()
        asyncio.get_running_loop().create_task(old_hub(theirs))
        return mine

    async def main() -> None:
        device = Connection(open_link, token="phone", tier=None, patience_s=5, extensions=[PROBE])
        await device.open()
        assert device.extensions == set()
        assert [hello.get("extensions") for hello in hellos] == [[PROBE], None]

    run(main())
