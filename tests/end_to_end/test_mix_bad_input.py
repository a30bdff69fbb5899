"""Mistakes with base networks on the command line: one sentence, exit code 2, no files left."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.protocol.messages import Error
from export.bundles.writer import Tier, export_bundles
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from tests.lib.commands import expect_one_sentence, refusal
from tests.lib.harness import hub_config, running_hub
from tests.lib.mixture_files import MODEL, tiers_toml
from tests.lib.mixture_models import made
from tests.lib.models import BUILD, CLASSES, IMAGE, build, example
from tests.lib.raw_client import RawClient, good_activations, raw

ADVERSARIAL = 'graphs = ["adversarial_train"]'


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> BundleIndex:
    """Bundles of one model, whose graphs no test runs."""
    return export_bundles(
        build(), {"small": Tier(1, runtime="torch")}, tmp_path_factory.mktemp("plain") / "bundles",
        example=example(IMAGE), classes=CLASSES, model_path=BUILD, verified=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "tier", "message"),
    [
        ("bases = 3", "", "the model cannot be split into 3 bases"),
        ("bases = 32", "", "the model cannot be split into 32 bases"),
        ("bases = 65", "", "bases is 65; it must be from 1 to 64, or 0"),
        ("bases = -1", "", "bases is -1; it must be from 1 to 64, or 0"),
        ("bases = 2.0", "", "bases is 2.0, must be of type int"),
        ("bases = 0", ADVERSARIAL, "adversarial_train in graphs has no effect without bases"),
        ("", ADVERSARIAL, "adversarial_train in graphs has no effect without bases"),
        ("dual_norms = true", "cut = 1", "dual_norms has no effect without bases"),
        ('bases = 4\ngraphs = ["backward"]', "", "leave out lora, and backward, finish, fuse and"),
        ("bases = 4\n[lora]", "", "leave out lora, and backward, finish, fuse and"),
        ("bases = 4", "cut = 3", "cut 3 is outside the model"),
    ],
)
def test_tiers_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, tier: str, message: str
) -> None:
    """Nothing is written beside the file."""
    path = tiers_toml(tmp_path, more, tier)
    line = refusal(
        capsys, "export", MODEL, "--tiers", str(path), "--out", str(tmp_path / "bundles")
    )
    assert message in line
    assert list(tmp_path.iterdir()) == [path]


HUB = """
bundles = "{bundles}"
tokens = "{tokens}"
run = "{run}"
[local]
hyper = {{ lr = 0.05 }}
[trunk]
device = "cpu"
hyper = {{ lr = 0.05 }}
{more}
"""


def hub_toml(folder: Path, bundles: Path, more: str) -> Path:
    """Write a hub's configuration beside its tokens."""
    TokenFile(folder / "tokens.toml").issue("phone")
    path = folder / "hub.toml"
    path.write_text(
        HUB.format(bundles=bundles, tokens=folder / "tokens.toml", run=folder / "run", more=more)
    )
    return path


SPLITMIX = '[method]\nname = "splitmix"\n'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "base networks"),
        ('[method]\nname = "supersfl"', "base networks"),
        (SPLITMIX + "[mix]\nbudgets = { cut = 0.2 }", "one of 4 bases takes 0.25; raise"),
        (
            SPLITMIX + "[mix]\nbudgets = { cut = 0 }",
            "budgets.cut is 0.0; it must be above 0",
        ),
        (
            SPLITMIX + "[mix]\nbudgets = { whole = 1.5 }",
            "budgets.whole is 1.5; it must be above 0",
        ),
        (SPLITMIX + "[mix]\nbudgets = 0.5", "budgets must be a table"),
        (SPLITMIX + "[mix]\nrobustness = 1.5", "robustness is 1.5; it must be from 0 to 1"),
        (SPLITMIX + "[mix]\nrobustness = -0.5", "robustness is -0.5; it must be from 0 to 1"),
        (SPLITMIX + "[mix]\nrobustness = nan", "robustness is nan, must be a number"),
        (SPLITMIX + "[mix.attack]\nepsilon = 0", "epsilon is 0.0; it must be above 0"),
        (SPLITMIX + "[mix.attack]\nepsilon = inf", "epsilon is inf; it must be above 0"),
        (SPLITMIX + "[mix.attack]\nsteps = 0", "steps is 0; it must be from 1 to 1000"),
        (SPLITMIX + "[mix.attack]\nlow = 1", "low must be below high"),
        (SPLITMIX + "[mix]\nrobust = 1", "unknown key 'robust'; known are"),
    ],
)
def test_hubs_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    """No run folder is created."""
    path = hub_toml(tmp_path, made(4).index.folder, more)
    assert message in refusal(capsys, "hub", "--config", str(path))
    assert {p.name for p in tmp_path.iterdir()} == {"hub.toml", "tokens.toml"}


def test_bundles_of_one_model_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: BundleIndex
) -> None:
    """The error says what to do."""
    line = refusal(capsys, "hub", "--config", str(hub_toml(tmp_path, plain.folder, SPLITMIX)))
    assert "export with bases = 8 in tiers.toml" in line
    assert not (tmp_path / "run").exists()


def test_the_command_itself(tmp_path: Path) -> None:
    """The command fails in the same way as a process."""
    path = tiers_toml(tmp_path, "bases = 3")
    expect_one_sentence(
        ["export", MODEL, "--tiers", str(path), "--out", str(tmp_path / "bundles")],
        "the model cannot be split into 3 bases",
    )
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"base": 1}, "base"),
        ({"noise": True}, "noise"),
        ({"present": np.ones(10, np.float32)}, "present"),
    ],
)
def test_activations_of_bases_where_there_are_none(
    tmp_path: Path, plain: BundleIndex, changes: dict[str, Any], field: str
) -> None:
    """A job with one model refuses messages of base networks."""

    async def job() -> None:
        config = hub_config(tmp_path, plain, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("evil")
        async with running_hub(config) as (_, url), raw(url) as connection:
            client = RawClient(connection)
            task = await client.join(token)
            assert task.bases is None
            message = good_activations(plain.manifest("small"), task.round)
            await client.say(replace(message, **changes))
            error = await client.hear(Error)
            assert (error.code, error.field) == ("bad_message", field)
            assert await client.closed()

    asyncio.run(asyncio.wait_for(job(), 30))
