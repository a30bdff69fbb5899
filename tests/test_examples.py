"""The scripts in ``examples`` run."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.config import load
from server_hub.config import HubConfig
from server_hub.gateway.tokens import TokenFile
from tests.lib.harness import examples, hub_config, running_hub, save_npz

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_digits_example_writes_examples_of_two_devices_and_a_held_out_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "digits" / "make_data.py"), run_name="__main__")
    files = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert files == ["device-0.npz", "device-1.npz", "held_out.npz"]
    for name in files:
        with np.load(tmp_path / "work" / name) as data:
            assert data["x"].shape == (len(data["y"]), 1, 8, 8)
            assert len(data["y"]) > 100


def test_an_app_collects_while_its_device_trains(tmp_path: Path, bundles: BundleIndex) -> None:
    """Later rounds have more rows than earlier ones; the hub's file is a valid configuration."""
    folder = EXAMPLES / "collect"
    config = load(HubConfig, folder / "hub.toml")
    save_npz(tmp_path / "digits.npz", examples(400))

    async def job() -> str:
        rules = replace(config.rounds, count=6)
        own = hub_config(tmp_path, bundles, rounds=rules, local=config.local)
        token = TokenFile(own.tokens).issue("phone", "small")
        async with running_hub(own) as (_, url):
            app = await asyncio.create_subprocess_exec(
                sys.executable, str(folder / "app.py"), "--url", url, "--token", token,
                "--digits", "digits.npz", "--database", "app.sqlite", "--cache", "cache",
                "--per-second", "100",
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
            )  # fmt: skip
            out, _ = await app.communicate()
            assert app.returncode == 0, out.decode()
            return out.decode()

    said = asyncio.run(job())
    rows = [int(found) for found in re.findall(r"round +\d+: (\d+) rows, loss", said)]
    assert len(rows) == 6
    assert rows[0] >= 15
    assert rows[-1] > rows[0]
    assert re.search(r"\d+ rows kept back: \d+% with the hub's help", said)
