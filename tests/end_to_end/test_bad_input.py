"""The hub answers bad input with a clear error, drops the device, logs it, and continues."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from edge_sdk import BundleError, Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.bundle.store import BlobStore
from edge_sdk.protocol.enums import CloseCode
from edge_sdk.protocol.frames import encode, unpack_tensors
from edge_sdk.protocol.messages import (
    Activations,
    Error,
    Message,
    Ready,
    Update,
    Welcome,
)
from edge_sdk.runtime import load_runtime
from server_hub.gateway.limits import Limits
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import StepInput, StepReport
from tests.lib.commands import expect_one_sentence, expect_refusal
from tests.lib.harness import examples, hub_config, running_hub, save_npz
from tests.lib.proxy import proxy
from tests.lib.raw_client import GOOD, RawClient, good_activations, good_update, raw


def change(tensors: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**tensors, name: value}


def spoil(array: Any, value: float) -> Any:
    spoiled = array.copy()
    spoiled.flat[0] = value
    return spoiled


ActivationCase = Callable[[Activations], Activations]
ACTIVATIONS: dict[str, tuple[ActivationCase, str, str]] = {
    "wrong dtype": (
        lambda a: replace(a, parts=change(a.parts, "h.q", a.parts["h.q"].astype(np.float32))),
        "bad_tensor",
        "h.q",
    ),
    "wrong shape": (
        lambda a: replace(a, parts=change(a.parts, "h.q", a.parts["h.q"][:, :1])),
        "bad_tensor",
        "h.q",
    ),
    "missing part": (
        lambda a: replace(a, parts={"h.q": a.parts["h.q"]}),
        "bad_tensor",
        "h.scale",
    ),
    "unexpected part": (
        lambda a: replace(a, parts=change(a.parts, "extra", a.labels)),
        "bad_tensor",
        "extra",
    ),
    "no rows": (
        lambda a: replace(a, parts=change(a.parts, "h.q", a.parts["h.q"][:0]), labels=a.labels[:0]),
        "bad_tensor",
        "h.q",
    ),
    "label too large": (lambda a: replace(a, labels=a.labels + 10), "bad_labels", "labels"),
    "label negative": (lambda a: replace(a, labels=a.labels - 1), "bad_labels", "labels"),
    "labels of another batch": (lambda a: replace(a, labels=a.labels[:3]), "bad_labels", "labels"),
    "labels are floats": (
        lambda a: replace(a, labels=a.labels.astype(np.float32)),
        "bad_labels",
        "labels",
    ),
    "infinite": (
        lambda a: replace(a, parts=change(a.parts, "h.scale", spoil(a.parts["h.scale"], np.inf))),
        "not_finite",
        "parts",
    ),
    "not a number": (
        lambda a: replace(a, parts=change(a.parts, "h.scale", spoil(a.parts["h.scale"], np.nan))),
        "not_finite",
        "parts",
    ),
    "so large that the loss overflows": (
        lambda a: replace(
            a, parts=change(a.parts, "h.scale", np.full_like(a.parts["h.scale"], 1e36))
        ),
        "not_finite",
        "parts",
    ),
}

UpdateCase = Callable[[Update], Update]
UPDATES: dict[str, tuple[UpdateCase, str, str]] = {
    "not a number": (
        lambda u: replace(
            u, tensors=change(u.tensors, "stem.weight", spoil(u.tensors["stem.weight"], np.nan))
        ),
        "not_finite",
        "stem.weight",
    ),
    "wrong shape": (
        lambda u: replace(u, tensors=change(u.tensors, "stem.weight", np.zeros(3, np.float32))),
        "bad_tensor",
        "stem.weight",
    ),
    "wrong dtype": (
        lambda u: replace(
            u,
            tensors=change(u.tensors, "stem.weight", u.tensors["stem.weight"].astype(np.float16)),
        ),
        "bad_tensor",
        "stem.weight",
    ),
    "a layer of the trunk": (
        lambda u: replace(u, tensors={**u.tensors, "head.out.weight": np.zeros(1, np.float32)}),
        "bad_tensor",
        "head.out.weight",
    ),
    "a tensor is missing": (
        lambda u: replace(u, tensors={n: t for n, t in u.tensors.items() if n != "stem.weight"}),
        "bad_tensor",
        "stem.weight",
    ),
    "more samples than it has": (lambda u: replace(u, samples=10**6), "bad_message", "samples"),
}


@pytest.mark.parametrize("case", [*(f"activations: {c}" for c in ACTIVATIONS),
                                  *(f"update: {c}" for c in UPDATES)])  # fmt: skip
def test_bad_contribution_is_dropped_and_the_round_goes_on(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """The sender gets an error with the field; the other device's round completes, with a log."""
    caplog.set_level(logging.WARNING, "cutlayer.hub")
    kind, name = case.split(": ")

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1, min_devices=2))
        tokens = TokenFile(config.tokens)
        manifest = bundles.manifest("small")
        async with running_hub(config) as (hub, url), raw(url) as connection:
            before = {n: t.copy() for n, t in hub.method.aggregation.trunk_state().items()}
            client = RawClient(connection)
            device = await Device.connect(
                url, token=tokens.issue("good"), tier="large", data=examples(24),
                cache=tmp_path / "cache",
            )  # fmt: skip
            async with device:
                training = asyncio.create_task(device.train())
                task = await client.join(tokens.issue("evil"))
                if kind == "activations":
                    spoiled, code, field = ACTIVATIONS[name]
                    await client.say(spoiled(good_activations(manifest, task.round)))
                else:
                    spoiled_update, code, field = UPDATES[name]
                    await client.say(good_activations(manifest, task.round))
                    await client.say(spoiled_update(good_update(manifest, task.round)))
                error = await client.hear(Error)
                assert (error.code, error.field, error.fatal) == (code, field, True)
                assert await client.closed()
                report = await training
            assert len(report.rounds) == 1
            (record,) = hub.run.records
            assert record.devices == 1
            assert list(record.dropped) == ["evil"]
            state = hub.method.aggregation.trunk_state()
            assert all(np.isfinite(t).all() for t in state.values())
            assert any((state[n] != before[n]).any() for n in state)
        assert any("evil" in line and error.message in line for line in caplog.messages)

    asyncio.run(job())


def test_an_update_does_not_count_when_its_activations_are_refused(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """This holds even if the update is complete before the trunk checks the activations."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1, min_devices=2))
        tokens = TokenFile(config.tokens)
        manifest = bundles.manifest("small")
        async with running_hub(config) as (hub, url), raw(url) as connection:
            client = RawClient(connection)
            device = await Device.connect(
                url, token=tokens.issue("good"), tier="large", data=examples(24),
                cache=tmp_path / "cache",
            )  # fmt: skip
            async with device:
                training = asyncio.create_task(device.train())
                task = await client.join(tokens.issue("evil"))
                while "good" not in hub.rounds.delivered:
                    await asyncio.sleep(0.01)
                spoil_it, code, _ = ACTIVATIONS["infinite"]
                await client.say(spoil_it(good_activations(manifest, task.round)))
                await client.say(good_update(manifest, task.round))
                assert (await client.hear(Error)).code == code
                await training
            (record,) = hub.run.records
            assert record.devices == 1
            assert list(record.dropped) == ["evil"]

    asyncio.run(job())


@pytest.mark.parametrize(
    ("hello", "code", "field"),
    [
        (replace(GOOD, version=2), "unsupported_version", "version"),
        (replace(GOOD, token="wrong"), "bad_token", "token"),
        (replace(GOOD, tier=None), "unknown_tier", "tier"),
        (replace(GOOD, tier="gigantic"), "unknown_tier", "tier"),
        (Ready(samples=3), "bad_message", None),
    ],
)
def test_bad_hello(
    tmp_path: Path,
    bundles: BundleIndex,
    caplog: pytest.LogCaptureFixture,
    hello: Message,
    code: str,
    field: str | None,
) -> None:
    """The error names the field, and the connection closes."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("evil")
        filled = replace(hello, token=token) if getattr(hello, "token", None) == "" else hello
        async with running_hub(config) as (_, url), raw(url) as connection:
            client = RawClient(connection)
            await client.say(filled)
            error = await client.hear(Error)
            assert (error.code, error.field, error.fatal) == (code, field, True)
            assert await client.closed()
        assert any("refused" in line for line in caplog.messages)

    asyncio.run(job())


def test_a_client_without_the_subprotocol(tmp_path: Path, bundles: BundleIndex) -> None:
    """A WebSocket client that does not request the protocol is refused in the handshake."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        async with running_hub(config) as (_, url):
            with pytest.raises(InvalidStatus) as caught:
                await connect(url, compression=None)
            assert caught.value.response.status_code == 400
            assert b"subprotocol" in (caught.value.response.body or b"")

    asyncio.run(job())


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "bad_frame"),
        (b"\xc1", "bad_frame"),
        (encode(Ready(samples=4), 1, 0)[:-3], "bad_frame"),
        (msgpack.packb(["ready", 1, 0, {"samples": 4}, "more"]), "bad_frame"),
        (msgpack.packb(["launch", 1, 0, {}]), "unknown_type"),
        (msgpack.packb(["ready", 1, 0, {"samples": "four"}]), "bad_message"),
        (msgpack.packb(["ready", 1, 7, {"samples": 4}]), "bad_frame"),
        (msgpack.packb(["ready", 3, 0, {"samples": 4}]), "sequence_gap"),
        (msgpack.packb(["round", 1, 0, {}]), "bad_message"),
        (b"\xdd\xff\xff\xff\xff", "bad_frame"),
        (b"\x94\xa5ready\x01\x00\xc9\x7f\xff\xff\xff\x01", "bad_frame"),
        ("text", "bad_frame"),
    ],
)
def test_bad_frame(tmp_path: Path, bundles: BundleIndex, frame: bytes | str, code: str) -> None:
    """Garbage after a valid hello gets an error and a close; the hub serves the next client."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("evil")
        async with running_hub(config) as (_, url):
            async with raw(url) as connection:
                client = RawClient(connection)
                await client.say(replace(GOOD, token=token))
                await client.hear(Welcome)
                await connection.send(frame)
                error = await client.hear(Error)
                # after a gap the connection is unusable, but the session is not
                assert (error.code, error.fatal) == (code, code != "sequence_gap")
                assert await client.closed()
            async with raw(url) as connection:
                client = RawClient(connection)
                await client.say(replace(GOOD, token=token))
                assert not (await client.hear(Welcome)).resumed

    asyncio.run(job())


def test_oversized_frame_is_refused_unread(tmp_path: Path, bundles: BundleIndex) -> None:
    """A frame over the limit closes the connection with 1009, and the reason has the limit."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, limits=Limits(max_frame=600_000, session_s=1))
        token = TokenFile(config.tokens).issue("evil")
        async with running_hub(config) as (_, url), raw(url) as connection:
            client = RawClient(connection)
            await client.say(replace(GOOD, token=token))
            await client.hear(Welcome)
            await connection.send(bytes(700_000))
            await asyncio.wait_for(connection.wait_closed(), 10)
            assert connection.close_code == CloseCode.MESSAGE_TOO_BIG
            assert "600000" in (connection.close_reason or "")

    asyncio.run(job())


def test_silent_client_is_let_go(tmp_path: Path, bundles: BundleIndex) -> None:
    """The hub closes a connection without a hello."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, limits=Limits(hello_s=0.3, session_s=1))
        async with running_hub(config) as (_, url), raw(url) as connection:
            error = await RawClient(connection).hear(Error)
            assert "no hello" in error.message

    asyncio.run(job())


def test_flooding_beyond_the_window_is_an_error(tmp_path: Path, bundles: BundleIndex) -> None:
    """A device that ignores the window is dropped, so the hub's queue stays bounded."""

    async def job() -> None:
        config = hub_config(
            tmp_path, bundles, rounds=RoundRules(count=1), limits=Limits(window=4, session_s=1)
        )
        token = TokenFile(config.tokens).issue("evil")
        manifest = bundles.manifest("small")
        async with running_hub(config) as (hub, url), raw(url) as connection:
            client = RawClient(connection)
            task = await client.join(token, samples=10_000)
            go, given, step = asyncio.Event(), [], hub.trunk.step

            async def stuck(arrivals: Sequence[StepInput]) -> StepReport:
                given.extend(arrivals)
                await go.wait()
                return await step(arrivals)

            hub.trunk.step = stuck  # type: ignore[method-assign]
            for batch in range(12):
                await client.say(replace(good_activations(manifest, task.round), batch=batch))
            error = await client.hear(Error)
            assert error.code == "window_exceeded"
            go.set()
            await asyncio.sleep(0.3)  # the trunk processes the batches that the hub has kept
            assert 1 <= len(given) <= 4

    asyncio.run(job())


def test_large_finite_activations_do_not_ruin_the_trunk(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """The gradient norm of a step is bounded, so the trunk changes little and still learns."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("evil")
        manifest = bundles.manifest("small")
        async with running_hub(config) as (hub, url), raw(url) as connection:
            before = {n: t.copy() for n, t in hub.method.aggregation.trunk_state().items()}
            client = RawClient(connection)
            task = await client.join(token)
            message = good_activations(manifest, task.round)
            scale = np.full_like(message.parts["h.scale"], 1e12)
            await client.say(replace(message, parts=change(message.parts, "h.scale", scale)))
            tensors = {s.name: before[s.name] for s in manifest.exchanged()}
            await client.say(replace(good_update(manifest, task.round), tensors=tensors))
            while not hub.run.records:
                await asyncio.sleep(0.02)
            after = hub.method.aggregation.trunk_state()
            moved = sum(float(((after[n] - before[n]) ** 2).sum()) for n in after) ** 0.5
            bound = config.trunk.max_norm * config.trunk.hyper["lr"]
            assert 0 < moved <= bound * 1.1

    asyncio.run(job())


def test_more_activations_than_examples(tmp_path: Path, bundles: BundleIndex) -> None:
    """A device cannot get a weight above the number of its declared examples."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("evil")
        async with running_hub(config) as (_, url), raw(url) as connection:
            client = RawClient(connection)
            task = await client.join(token, samples=12)
            for batch in range(2):
                message = good_activations(bundles.manifest("small"), task.round)
                await client.say(replace(message, batch=batch))
            error = await client.hear(Error)
            assert (error.code, error.field) == ("bad_message", "parts")

    asyncio.run(job())


def test_tampered_blob_never_reaches_the_runtime(tmp_path: Path, bundles: BundleIndex) -> None:
    """The hash reveals a blob that was changed on the way, and the cache does not keep it."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles)
        token = TokenFile(config.tokens).issue("phone")
        manifest = bundles.manifest("small")
        blob = manifest.graphs["train"].blob
        async with running_hub(config) as (_, url):
            data = bundles.blobs().read(blob)
            middle = data[len(data) // 2 : len(data) // 2 + 32]
            changed = data.replace(middle, bytes(32))
            assert changed != data
            cache = tmp_path / "cache"
            async with proxy(url, down=lambda frame: frame.replace(middle, bytes(32))) as between:
                with pytest.raises(BundleError, match="changed or damaged"):
                    await Device.connect(between, token=token, tier="small", cache=cache)
            assert blob not in BlobStore(cache)
            assert BlobStore(cache).partial(blob) == 0
            # over an intact link, the same device joins
            device = await Device.connect(url, token=token, tier="small", cache=cache)
            await device.close()
            # a damaged file in the cache is found and downloaded again
            (cache / blob).write_bytes(changed)
            device = await Device.connect(url, token=token, tier="small", cache=cache)
            await device.close()
            assert BlobStore(cache).read(blob) == bundles.blobs().read(blob)

    asyncio.run(job())


def test_graph_that_is_no_onnx_file(bundles: BundleIndex) -> None:
    """Every run of a graph in such a file raises BundleError."""
    manifest = bundles.manifest("small")
    state = unpack_tensors(bundles.blobs().read(manifest.initial_state))
    runtime = load_runtime(Bundle(manifest, dict.fromkeys(manifest.graphs, b"junk"), state))
    for graph in (*manifest.graphs, *manifest.graphs):
        with pytest.raises(BundleError, match=f"cannot load the graph '{graph}'"):
            runtime.run(graph, {})


def test_operator_mistakes_are_one_sentence(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    """A used port, missing bundles, broken TOML, unknown keys: one sentence and exit code 2."""
    TokenFile(tmp_path / "tokens.toml").issue("phone")
    tokens = ["--tokens", str(tmp_path / "tokens.toml")]
    folder = str(bundles.folder)

    async def occupied() -> None:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await asyncio.to_thread(
            expect_one_sentence,
            [
                "hub",
                "--bundles",
                folder,
                *tokens,
                "--run",
                str(tmp_path / "a"),
                "--port",
                str(port),
            ],
            "cannot listen",
            str(port),
        )
        server.close()

    asyncio.run(occupied())
    run = ["--run", str(tmp_path / "b")]
    expect_refusal(
        capsys,
        ["hub", "--bundles", str(tmp_path / "none"), *tokens, *run],
        "no bundles",
        "cutlayer export",
    )
    expect_refusal(
        capsys, ["hub", "--bundles", folder, "--tokens", "nowhere.toml", *run], "nowhere"
    )
    broken = tmp_path / "broken.toml"
    broken.write_text("bundles = ")
    expect_refusal(capsys, ["hub", "--config", str(broken)], "broken.toml", "not valid TOML")
    broken.write_text('bundles = "x"\ntokens = "y"\n[rounds]\ncout = 3\n')
    expect_refusal(capsys, ["hub", "--config", str(broken)], "rounds", "cout", "count")
    expect_refusal(capsys, ["device", "--config", str(broken)], "unknown key")
    expect_refusal(capsys, ["device", "--url", "ws://127.0.0.1:1", "--tier", "small"], "'token'")
    expect_refusal(capsys, ["device", "--url", "ws://127.0.0.1:1", "--token", "t"], "nothing to do")
    data = str(save_npz(tmp_path / "d.npz", examples(4)))
    expect_refusal(
        capsys,
        ["device", "--url", "http://x", "--token", "t", "--tier", "small", "--data", data],
        "not a websocket address",
    )
    expect_refusal(
        capsys,
        ["device", "--url", "ws://127.0.0.1:1", "--token", "t", "--tier", "small",
         "--data", data, "--patience-s", "0.2"],
        "cannot connect",
        code=1,
    )  # fmt: skip
    expect_refusal(
        capsys,
        ["export", "no.module:build", "--tiers", str(broken), "--out", str(tmp_path / "o")],
        "unknown key",
    )
    good = tmp_path / "tiers.toml"
    good.write_text("classes = 10\ninput_shape = [1, 8, 8]\n[tiers.small]\ncut = 9\n")
    expect_refusal(
        capsys,
        ["export", "no.module:build", "--tiers", str(good), "--out", str(tmp_path / "o")],
        "no.module",
    )
    expect_refusal(
        capsys,
        ["export", "tests.lib.models:build", "--tiers", str(good), "--out", str(tmp_path / "o")],
        "cut 9 is outside the model",
    )
    assert not (tmp_path / "o").exists()


def test_damaged_bundle_is_told_at_the_start(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hub does not start with bundles that differ by one byte."""
    import shutil

    folder = tmp_path / "bundles"
    shutil.copytree(bundles.folder, folder)
    blob = bundles.manifest("small").graphs["train"].blob
    data = bytearray((folder / "blobs" / blob).read_bytes())
    data[100] ^= 1
    (folder / "blobs" / blob).write_bytes(data)
    TokenFile(tmp_path / "tokens.toml").issue("phone")
    expect_refusal(
        capsys,
        ["hub", "--bundles", str(folder), "--tokens", str(tmp_path / "tokens.toml"),
         "--run", str(tmp_path / "run")],
        "changed or damaged",
        blob[:12],
    )  # fmt: skip
