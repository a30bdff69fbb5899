"""A device whose data grows while it trains, with a share that is kept back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.training.local_data import is_kept_back
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.settings import MethodConfig
from server_hub.rounds.rounds import RoundRules
from tests.lib.collected import Collected
from tests.lib.harness import examples, hub_config, running_hub


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
