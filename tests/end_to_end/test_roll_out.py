"""Releases over real connections: devices get them, check them, and say what they run."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import BundleError, CutlayerError, HubError
from edge_sdk.protocol.message import EXTENSIONS, RELEASE
from edge_sdk.protocol.messages import Error, Infer, Message, Ready, Update
from edge_sdk.protocol.release import Running
from export.bundles.writer import Tier, segment_of
from export.cutting.split_model import SplitModel
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.releases import Release, Releases
from server_hub.gateway.tokens import TokenFile
from server_hub.release_server import ReleaseConfig, ReleaseServer
from tests.lib.harness import (
    cutlayer,
    examples,
    finish,
    hub_config,
    next_event,
    running_hub,
    save_npz,
    served,
)
from tests.lib.raw_client import RawClient, raw
from tests.lib.releases import spoiled, trained_bundles
from tests.lib.tasks import run

Trained = tuple[Path, SplitModel]


@pytest.fixture(scope="module")
def made(bundles: BundleIndex, tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Bundles of trained models, with these; the last ones are spoiled."""
    folder = tmp_path_factory.mktemp("trained")
    found = [trained_bundles(folder / str(n), bundles, n) for n in range(4)]
    spoiled(found[3][0])
    return found


class Served:
    """A folder with tokens and releases, and a server for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = TokenFile(folder / "tokens.toml")
        self.releases = Releases(folder / "releases", create=True)
        self.token = self.tokens.issue("ada", "small", download_only=True)

    def server(self) -> ReleaseServer:
        limits = Limits(session_s=5.0, hello_s=2.0)
        return ReleaseServer(
            ReleaseConfig(self.releases.folder, self.tokens.path, Listen(port=0), limits)
        )

    async def device(self, url: str, token: str | None = None, **options: object) -> Device:
        cache = self.folder / "cache"
        return await Device.connect(url, token=token or self.token, cache=cache, **options)  # type: ignore[arg-type]

    def state(self, number: int) -> Release:
        return self.releases.published()[number - 1]


@pytest.fixture
def place(tmp_path: Path) -> Served:
    return Served(tmp_path)


async def answers_of(device: Device, x: np.ndarray) -> np.ndarray:
    """The probabilities of a device's answer, which asks no hub."""
    found = await device.predict(x, confidence=1.1)
    assert not found.by_hub.any()
    return found.probabilities


def probabilities(model: SplitModel, x: np.ndarray) -> np.ndarray:
    """The mean of the softmax of the heads that the tier ``small`` has: that at depth 1."""
    with torch.no_grad():
        logits = segment_of(model, Tier(1, "int8")).eval()(torch.from_numpy(x))[1]
    found: np.ndarray = logits.double().softmax(-1).mean(0).numpy()
    return found


def test_a_device_follows_the_releases(place: Served, made: list[Trained]) -> None:
    """It gets the newest one, says that it runs it, and goes back when it is taken back."""
    x = examples(9).x
    place.releases.publish(made[0][0])

    async def main() -> None:
        async with served(place.server()) as url, await place.device(url) as device:
            assert device.release == 1
            np.testing.assert_allclose(
                await answers_of(device, x), probabilities(made[0][1], x), atol=1e-5
            )
            assert not await device.refresh()
            place.releases.publish(made[1][0])
            assert await device.refresh()
            assert device.release == 2
            np.testing.assert_allclose(
                await answers_of(device, x), probabilities(made[1][1], x), atol=1e-5
            )
            place.releases.withdraw(2)
            assert await device.refresh()
            assert device.release == 1
            np.testing.assert_allclose(
                await answers_of(device, x), probabilities(made[0][1], x), atol=1e-5
            )
            evaluation = await device.evaluate(examples(20))
            assert evaluation.through_hub is evaluation.ensemble is None
            assert 0 <= evaluation.device_alone <= 1
        assert (place.state(1).devices, place.state(2).devices) == (1, 0)

    run(main())


def test_a_release_that_fails_the_device_s_check_is_not_used(
    place: Served, made: list[Trained], caplog: pytest.LogCaptureFixture
) -> None:
    """The present bundle stays, and after a restart it is loaded again; the hub learns why."""
    x = examples(9).x
    place.releases.publish(made[0][0])

    async def main() -> None:
        async with served(place.server()) as url:
            async with await place.device(url) as device:
                before = await answers_of(device, x)
                place.releases.publish(made[3][0])
                assert not await device.refresh()
                assert device.release is None
                np.testing.assert_array_equal(await answers_of(device, x), before)
                assert not await device.refresh(), "it is not tried again"
            assert "does not answer its sample" in place.state(2).refused["ada"]
            assert (place.state(1).devices, place.state(2).devices) == (1, 0)
            async with await place.device(url) as device:
                assert device.release is None
                np.testing.assert_array_equal(await answers_of(device, x), before)
            place.releases.publish(made[1][0])
            async with await place.device(url) as device:
                assert device.release == 3
            assert (place.state(2).refused, place.state(3).devices) == ({}, 1)

    run(main())
    assert caplog.text.count("release 2 is refused") == 2
    assert "ada refuses a release" in caplog.text


def test_a_first_release_that_fails_leaves_nothing_to_go_back_to(
    place: Served, made: list[Trained]
) -> None:
    place.releases.publish(made[3][0])

    async def main() -> None:
        async with served(place.server()) as url:
            with pytest.raises(BundleError, match="does not answer its sample"):
                await place.device(url)
            assert list(place.state(1).refused) == ["ada"]
            assert place.state(1).devices == 0

    run(main())


def test_a_bundle_that_its_owner_did_not_sign_is_refused_like_any_other(
    place: Served, made: list[Trained]
) -> None:
    place.releases.publish(made[0][0])

    async def main() -> None:
        async with served(place.server()) as url:
            async with await place.device(url):
                pass
            place.releases.publish(made[1][0])
            async with await place.device(url, trust=None) as device:
                assert device.release == 2
            with pytest.raises(BundleError, match="signed"):
                await place.device(url, trust=["ab" * 32])
            assert "signed" in place.state(2).refused["ada"]

    run(main())


def test_a_share_of_the_devices_gets_a_release_first(place: Served, made: list[Trained]) -> None:
    place.releases.publish(made[0][0])
    place.releases.publish(made[1][0], 0.5)
    names = [f"phone-{n}" for n in range(12)]
    tokens = {name: place.tokens.issue(name, "small", download_only=True) for name in names}

    async def main() -> None:
        async with served(place.server()) as url:

            async def runs() -> dict[str, int | None]:
                found = {}
                for name, token in tokens.items():
                    async with await place.device(url, token) as device:
                        found[name] = device.release
                return found

            first = await runs()
            assert set(first.values()) == {1, 2}
            place.releases.set_share(2, 1.0)
            assert set((await runs()).values()) == {2}
            place.releases.withdraw(2)
            assert set((await runs()).values()) == {1}
        assert place.state(1).devices == len(names)

    run(main())


def test_a_device_for_which_there_is_nothing_yet(place: Served, made: list[Trained]) -> None:
    place.releases.publish(made[0][0], 1e-9)
    other = place.tokens.issue("bo", download_only=True)

    async def main() -> None:
        async with served(place.server()) as url:
            with pytest.raises(HubError, match="there is no release of tier 'small' for ada yet"):
                await place.device(url)
            with pytest.raises(HubError, match="bo's token is for no tier; say one of large"):
                await place.device(url, other)
            with pytest.raises(HubError, match="there is no tier 'huge' for bo"):
                await place.device(url, other, tier="huge")
            place.releases.withdraw(1)
            with pytest.raises(HubError, match="there are none yet"):
                await place.device(url)

    run(main())


# --- tokens that only download ------------------------------------------------------------------


FORBIDDEN: list[Message] = [
    Ready(samples=3),
    Infer(1, {"h.q": np.zeros((1, 4), np.int8)}),
    Update(1, {}, True, 1, {}),
]


@pytest.mark.parametrize("message", FORBIDDEN, ids=lambda m: m.TYPE)
@pytest.mark.parametrize("where", ["releases", "job", "job with releases"])
def test_such_a_token_neither_trains_nor_asks(
    where: str, message: Message, place: Served, made: list[Trained], bundles: BundleIndex
) -> None:
    """The session ends, and a job does not notice."""
    place.releases.publish(made[0][0])
    trainer = place.tokens.issue("bo", "small")

    async def refused(url: str) -> None:
        async with raw(url) as connection:
            client = RawClient(connection, EXTENSIONS)
            welcome = await client.greet(place.token)
            assert welcome.extensions == [RELEASE]
            assert welcome.release == (0 if where == "job" else 1)
            client.extensions = [RELEASE]
            await client.say(message)
            error = await client.hear(Error)
            assert error.code == "bad_message"
            assert f"ada's token only downloads; {message.TYPE} needs another" in error.message
            assert await client.closed()

    async def main() -> None:
        if where == "releases":
            async with served(place.server()) as url:
                await refused(url)
            return
        folder = place.releases.folder if where == "job with releases" else None
        config = hub_config(place.folder, bundles, releases=folder)
        async with running_hub(config) as (hub, url):
            await refused(url)
            async with await place.device(url, trainer, data=examples(24)) as device:
                assert len((await device.train()).rounds) == 2
                assert device.release is None
            assert hub.finished

    run(main(), 60)


def test_in_a_job_without_releases_such_a_device_gets_the_job_s_model(
    place: Served, bundles: BundleIndex
) -> None:
    """With the state of the last round, which :meth:`Device.refresh` brings."""
    x = examples(9).x
    trainer = place.tokens.issue("bo", "small")

    async def main() -> None:
        config = hub_config(place.folder, bundles, keep_serving=True)
        async with running_hub(config) as (hub, url):
            async with await place.device(url) as device:
                before = await answers_of(device, x)
                async with await place.device(url, trainer, data=examples(24)) as other:
                    await other.train()
                assert not await device.refresh(), "the bundle is the same, its state another"
                after = await answers_of(device, x)
                assert np.abs(after - before).max() > 1e-3
            async with await place.device(url, data=examples(4)) as device:
                with pytest.raises(HubError, match="only downloads"):
                    await device.train()
            assert hub.finished

    run(main(), 60)


def test_a_job_and_its_releases_are_served_side_by_side(
    place: Served, made: list[Trained], bundles: BundleIndex
) -> None:
    x = examples(9).x
    place.releases.publish(made[0][0])
    trainer = place.tokens.issue("bo", "small")

    async def main() -> None:
        config = hub_config(place.folder, bundles, releases=place.releases.folder)
        async with running_hub(config) as (_, url), await place.device(url) as device:
            async with await place.device(url, trainer, data=examples(24)) as other:
                await other.train()
                found = await other.predict(x, confidence=1.1)
                assert found.by_hub.all(), "a device of the job asks the hub"
            np.testing.assert_allclose(
                await answers_of(device, x), probabilities(made[0][1], x), atol=1e-5
            )

    run(main(), 60)


def test_a_device_that_was_absent_at_the_end_gets_the_final_model(
    place: Served, made: list[Trained]
) -> None:
    """It comes with the token that it trained with, and is told that there is no job."""
    x = examples(9).x
    place.releases.publish(made[0][0])
    token = place.tokens.issue("bo", "small")

    async def main() -> None:
        async with (
            served(place.server()) as url,
            await place.device(url, token, data=examples(24)) as device,
        ):
            report = await device.train()
            assert report.rounds == []
            assert report.reason == "there is no job here, and the newest release is loaded"
            np.testing.assert_allclose(
                await answers_of(device, x), probabilities(made[0][1], x), atol=1e-5
            )
            assert device.release == 1

    run(main())


def test_a_device_that_trains_is_not_refreshed(place: Served, bundles: BundleIndex) -> None:
    trainer = place.tokens.issue("bo", "small")

    async def main() -> None:
        async with running_hub(hub_config(place.folder, bundles)) as (_, url):
            device = await place.device(url, trainer, data=examples(24))
            async with device:
                said = []

                def on_round(report: object) -> None:
                    said.append(report)

                training = asyncio.create_task(device.train(on_round))
                await asyncio.sleep(0)
                with pytest.raises(CutlayerError, match="the device is training"):
                    await device.refresh()
                await training
                assert len(said) == 2

    run(main(), 60)


def test_who_says_too_often_what_it_runs_is_sent_away(place: Served, made: list[Trained]) -> None:
    place.releases.publish(made[0][0])

    async def main() -> None:
        async with served(place.server()) as url, raw(url) as connection:
            client = RawClient(connection, [RELEASE])
            await client.greet(place.token)
            for number in range(12):
                await client.say(Running(f"{number:064x}"))
            assert "running too often" in (await client.hear(Error)).message
            assert await client.closed()

    run(main())


# --- processes ----------------------------------------------------------------------------------

CRASHING = """
import asyncio, os, sys
from edge_sdk.device import Device
from edge_sdk.runtime import load_runtime
from edge_sdk.transport.link import open_websocket

url, token, cache, fatal = sys.argv[1:]

def load(bundle, threads):
    if bundle.manifest.sample == fatal:
        os._exit(77)
    return load_runtime(bundle, threads)

async def main():
    device = Device(lambda: open_websocket(url), load, token=token, cache=cache)
    await device.join()
    print(bundle_of(device))
    await device.close()

def bundle_of(device):
    return device.manifest.sample

asyncio.run(main())
"""


def test_a_release_that_ends_the_process_is_not_tried_for_ever(
    place: Served, made: list[Trained]
) -> None:
    """After two attempts the device goes back to the one before, and says so."""
    good, fatal = (BundleIndex.read(folder).manifest("small").sample for folder, _ in made[:2])
    place.releases.publish(made[0][0])

    async def main() -> None:
        async with served(place.server()) as url:

            async def started() -> tuple[int | None, str]:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", CRASHING, url, place.token,
                    str(place.folder / "cache"), fatal, stdout=subprocess.PIPE,
                )  # fmt: skip
                out, _ = await process.communicate()
                return process.returncode, out.decode().strip()

            assert await started() == (0, good)
            place.releases.publish(made[1][0])
            assert await started() == (77, "")
            assert await started() == (77, "")
            for _ in range(2):  # and it stays so
                assert await started() == (0, good)
            assert "ended 2 times" in place.state(2).refused["ada"]
            place.releases.publish(made[2][0])
            assert (await started())[0] == 0
            assert place.state(3).devices == 1

    run(main(), 120)


def test_the_commands_roll_a_model_out(place: Served, made: list[Trained]) -> None:
    data = save_npz(place.folder / "held_out.npz", examples(30))
    place.releases.publish(made[0][0])
    server = cutlayer(
        "release", "serve", "--releases", str(place.releases.folder),
        "--tokens", str(place.tokens.path), "--port", "0", "--json",
    )  # fmt: skip
    try:
        url = next_event(server, "ready")["address"]

        def device() -> subprocess.Popen[str]:
            return cutlayer(
                "device", "--url", url, "--token", place.token, "--evaluate", str(data),
                "--cache", str(place.folder / "cache"), "--json",
            )  # fmt: skip

        code, out, err = finish(device())
        assert code == 0, err
        said = json.loads(out)
        assert said["release"] == 1
        assert said["evaluation"]["through_hub"] is None
        assert not said["torch_imported"]
        assert "tier small, cut 1, int8 activations, release 1" in err
        code, _, err = finish(cutlayer("release", "publish", str(made[3][0]),
                                       "--releases", str(place.releases.folder)))  # fmt: skip
        assert code == 0, err
        code, out, err = finish(device())
        assert code == 0, err
        assert json.loads(out)["release"] is None
        assert "release 2 is refused" in err
    finally:
        server.send_signal(signal.SIGTERM)
        code, _, err = finish(server)
    assert code == 143, err
    assert "Traceback" not in err
