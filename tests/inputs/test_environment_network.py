"""Addresses and proxies, as people write them and as their environment has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError, LinkClosed
from edge_sdk.transport.link import open_websocket
from server_hub.gateway.limits import Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from tests.lib.commands import expect_refusal
from tests.lib.harness import examples, hub_config, running_hub, save_npz, take_part

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "WS_PROXY", "WSS_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the tests names no proxy."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


NO_ADDRESS = [
    "hub.example.com", "hub.example.com:8765", "http://x",
    "ws://", "ws:///x", "ws://:1", "ws://[::1",
    "ws://::1]:1", "ws://[::g]:1", "ws://x:port", "ws://x:99999", "ws://x:-1", "ws://x#y", "ws://user@x",
    f"ws://{'a' * 300}é:1", "ws://é..x:1", "C:\\hub", "ws://x y:1",
]  # fmt: skip


@pytest.mark.parametrize("url", NO_ADDRESS)
def test_what_is_no_address(tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    """It is refused at once, in one sentence, instead of tried until the patience ends."""
    data = str(save_npz(tmp_path / "d.npz", examples(4)))
    given = ["device", "--token", "t", "--data", data, "--patience-s", "30", "--url", url]
    expect_refusal(capsys, given, "is not a websocket address", "ws://HOST:PORT")


@pytest.mark.parametrize(
    "url", ["ws://[::1]:1", "ws://127.0.0.1:1", "ws://localhost:1", "ws://nowhere.invalid:1",
            "ws://größe.invalid:1", "wss://127.0.0.1:1"]
)  # fmt: skip
def test_an_address_where_nobody_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    data = str(save_npz(tmp_path / "d.npz", examples(4)))
    given = ["device", "--token", "t", "--data", data, "--patience-s", "0.1", "--url", url]
    expect_refusal(capsys, given, f"cannot connect to {url}: ", code=1)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_hub_listens_on_ipv6(tmp_path: Path, bundles: BundleIndex, host: str) -> None:
    """Its address has brackets, and devices use it as it is printed."""

    async def job() -> None:
        config = hub_config(
            tmp_path, bundles, rounds=RoundRules(count=1), listen=Listen(host=host, port=0)
        )
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url):
            assert url.startswith("ws://[::1]:")
            await take_part(url, token, tmp_path / "cache")

    asyncio.run(job())


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "::2", "a b", "é" * 80])
def test_a_host_that_is_not_this_machine(tmp_path: Path, bundles: BundleIndex, host: str) -> None:

    async def job() -> None:
        listen = Listen(host=host, port=0)
        async with running_hub(hub_config(tmp_path, bundles, listen=listen)):
            pass

    with pytest.raises(ConfigError, match="cannot listen on ") as caught:
        asyncio.run(job())
    assert "an address of this machine" in str(caught.value)


# --- proxies ------------------------------------------------------------------------------------

FAR = "ws://hub.invalid:8765"
"""A hub that only a proxy can reach."""


@pytest.mark.parametrize(
    ("variable", "proxy"),
    [
        ("HTTPS_PROXY", "nonsense"),
        ("https_proxy", "ftp://proxy.invalid:1"),
        ("HTTP_PROXY", "http://user@proxy.invalid:1"),
        ("HTTP_PROXY", "http://proxy.invalid:99999"),
        ("HTTP_PROXY", "http://[::1:3128"),
        ("ALL_PROXY", "http://proxy.invalid/path"),
    ],
)
def test_a_proxy_that_is_none(monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str) -> None:
    monkeypatch.setenv(variable, proxy)
    if variable == "ALL_PROXY":  # which Python does not read
        with pytest.raises(LinkClosed, match=r"cannot connect to ws://hub\.invalid"):
            asyncio.run(open_websocket(FAR))
        return
    with pytest.raises(ConfigError, match="the proxy that the environment names cannot be used"):
        asyncio.run(open_websocket(FAR))


def test_a_proxy_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with pytest.raises(LinkClosed, match=r"cannot connect to ws://hub\.invalid:8765"):
        asyncio.run(open_websocket(FAR))


@asynccontextmanager
async def web_proxy(to: str, status: str = "200 OK") -> AsyncIterator[str]:
    """A proxy that connects whoever asks for anything to one address; yields its own."""
    host, port = to.removeprefix("ws://").split(":")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(2**16):
            sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        assert request.startswith(b"CONNECT hub.invalid:8765 HTTP/1.1")
        writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if not status.startswith("200"):
            writer.close()
            return
        back, on = await asyncio.open_connection(host, port)
        await asyncio.gather(carry(reader, on), carry(back, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_a_device_goes_through_the_proxy_of_its_environment(
    tmp_path: Path, bundles: BundleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub on the same machine, and those of NO_PROXY, are reached without it."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url), web_proxy(url) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy)
            async with await Device.connect(
                FAR, token=token, tier="small", data=examples(24), cache=tmp_path / "cache"
            ) as device:
                monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
                near = await open_websocket(url)
                await near.close()
                assert (await device.train()).reason == "the job is finished"
            monkeypatch.setenv("NO_PROXY", ".invalid")
            with pytest.raises(LinkClosed, match="cannot connect"):
                await open_websocket(FAR)

    asyncio.run(job())


def test_a_proxy_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def job() -> None:
        async with web_proxy("ws://127.0.0.1:1", "407 Proxy Authentication Required") as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy)
            with pytest.raises(LinkClosed, match=r"through the proxy.*407"):
                await open_websocket(FAR)

    asyncio.run(job())
