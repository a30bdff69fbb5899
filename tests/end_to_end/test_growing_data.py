"""A device whose data grows while it trains, with a share that is kept back."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.protocol.message import RECOUNT
from edge_sdk.protocol.messages import Error, Ready, Stop
from edge_sdk.training.local_data import is_kept_back
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.settings import MethodConfig
from server_hub.rounds.rounds import RoundRules
from tests.lib.collected import Collected
from tests.lib.commands import expect_refusal
from tests.lib.data_files import write_arrays, write_sqlite
from tests.lib.harness import (
    cutlayer,
    examples,
    finish,
    hub_config,
    running_hub,
    save_npz,
)
from tests.lib.raw_client import RawClient, good_activations, good_update, raw


@pytest.mark.parametrize("form", ["merged", "paper"])
def test_a_round_trains_on_what_there_was_when_it_began(
    tmp_path: Path, bundles: BundleIndex, form: Literal["merged", "paper"]
) -> None:
    """Rows come and go; the hub counts those of each round, and kept rows are never trained on."""
    pool = examples(200)
    source = Collected(pool, range(40))
    kept = set(np.flatnonzero(is_kept_back(np.arange(200), 0.25)).tolist())
    present = [range(40), range(10, 90), range(60, 80), range(60, 200)]

    async def job() -> None:
        rules, method = RoundRules(count=4), MethodConfig(form=form)
        # the hub asks for no evaluation, which would read the kept rows
        config = hub_config(tmp_path, bundles, rounds=rules, method=method, evaluation_s=0)
        token = TokenFile(config.tokens).issue("phone")
        async with (
            running_hub(config) as (_, url),
            await Device.connect(
                url,
                token=token,
                tier="small",
                data=source,
                keep_back=0.25,
                cache=tmp_path / "cache",
            ) as device,
        ):
            rounds: list[list[int]] = []

            def after(_: object) -> None:
                rounds.append(sorted({row for read in source.seen for row in read}))
                source.seen.clear()
                source.here = list(present[min(len(rounds), 3)])

            source.seen.clear()
            await device.train(after)
            assert len(rounds) == 4
            for number, trained in enumerate(rounds):
                assert trained == sorted(set(present[number]) - kept)
            held = device.kept_back()
            assert len(held) == len(kept & set(present[3]))
            report = await device.evaluate(held)
            assert report.samples == len(held)
            assert {row for read in source.seen for row in read} == kept & set(present[3])

    asyncio.run(job())


@pytest.mark.parametrize(
    ("samples", "late", "field"),
    [(64, False, None), (64, True, "from_round"), (99, False, "samples")],
)
def test_the_hub_bounds_what_a_device_says_anew(
    tmp_path: Path, bundles: BundleIndex, samples: int, late: bool, field: str | None
) -> None:
    """More examples than the operator allows are refused, and a count after the fact."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        config = replace(config, limits=replace(config.limits, samples=80))
        token, manifest = TokenFile(config.tokens).issue("phone"), bundles.manifest("small")
        async with running_hub(config) as (hub, url), raw(url) as connection:
            client = RawClient(connection, [RECOUNT])
            task = await client.join(token, samples=8)
            anew = Ready(samples=samples, from_round=task.round)
            if not late:
                await client.say(anew)
            for batch in range(8 if field is None else 1):  # more rows than were said at first
                activations = good_activations(manifest, task.round)
                await client.say(replace(activations, batch=batch))
            if late:
                await client.say(anew)
            if field is not None:
                error = await client.hear(Error)
                assert (error.code, error.field) == ("bad_message", field)
                return
            await client.say(replace(good_update(manifest, task.round), samples=samples))
            await client.hear(Stop)
            assert [record.devices for record in hub.run.records] == [1]

    asyncio.run(job())


def test_the_command_reads_any_format_and_measures_on_what_is_kept_back(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """Two devices as processes, one with SQLite and one with images."""
    data = examples(60)
    (tmp_path / "images").mkdir()
    found = write_sqlite(tmp_path, data), write_arrays(tmp_path / "images", data)
    more = [["--newest", "40", "--keep-back", "0.3"], ["--evaluate", str(found[0])]]

    async def job() -> list[tuple[int, str, str]]:
        rules = RoundRules(count=2, min_devices=2)
        config = hub_config(tmp_path, bundles, rounds=rules)
        tokens = [TokenFile(config.tokens).issue(path.name, "small") for path in found]
        async with running_hub(config) as (_, url):
            devices = [
                cutlayer(
                    "device", "--url", url, "--data", str(path), *extra, "--json",
                    "--cache", str(tmp_path / "cache" / path.name), CUTLAYER_TOKEN=token,
                )
                for path, extra, token in zip(found, more, tokens, strict=True)
            ]  # fmt: skip
            return await asyncio.gather(*(asyncio.to_thread(finish, d) for d in devices))

    results = []
    for code, out, err in asyncio.run(job()):
        assert code == 0, err
        results.append(json.loads(out))
    kept = results[0]["evaluation"]["samples"]
    assert 0 < kept < 40
    assert [r["samples"] for r in results[0]["rounds"]] == [40 - kept] * 2
    assert [r["samples"] for r in results[1]["rounds"]] == [60] * 2
    assert results[1]["evaluation"]["samples"] == 60
    assert not any(result["torch_imported"] for result in results)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "a.npz"], "a.npz has no array x, y"),
        (["--data", "a.csv"], "a.csv, line 3 has 1 cells, the first line names 3 columns"),
        (["--data", "b.npz", "--keep-back", "1"], "keep_back is 1.0; it must be from 0 to below 1"),
        (["--data", "b.npz", "--max-age-s", "0"], "max_age_s is 0.0; it must be above 0"),
        (["--data", "b.npz", "--max-age-s", "5"], "have no time, so they have no age"),
        (["--evaluate", "b.npz", "--newest", "5"], "--newest and --max-age-s need --data"),
        (["--data", "c.bin"], "the format of c.bin is not known"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz")
    save_npz(Path("b.npz"), examples(4))
    Path("a.csv").write_text("time,y,f\n1,2,3\n4\n")
    Path("c.bin").write_bytes(b"")
    command = ["device", "--url", "ws://127.0.0.1:1", "--token", "t", *arguments]
    expect_refusal(capsys, command, said)
