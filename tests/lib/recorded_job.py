"""The small job that a device was recorded in, and in which the recording is played again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.training.data import Examples
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import WEIGHTS, SplitModel
from export.packing.codecs import CODECS
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.trunk.local import LocalTrunk
from tests.lib.codecs import PerChannel
from tests.lib.harness import hub_config, served
from tests.lib.specification import ROOT

RECORDING = ROOT / "tests" / "vectors" / "device_v1_0.json"
"""Frames of a device before the protocol had extensions, and of the hub that it met."""

WIDTH, INPUTS, CLASSES = 4, 3, 3
TIER = "small"
ROUNDS = 2


def build() -> SplitModel:
    """Three blocks of a linear layer and a ReLU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(3)]
        return SplitModel(nn.Linear(INPUTS, WIDTH), blocks, nn.Linear(WIDTH, CLASSES))


def data() -> Examples:
    """Examples of the device: the class is the largest of the inputs."""
    x = np.random.default_rng(0).standard_normal((20, INPUTS)).astype(np.float32)
    return Examples(x, x.argmax(1))


@asynccontextmanager
async def hub_of_the_job(folder: Path) -> AsyncIterator[tuple[Hub, str, str]]:
    """A hub that runs the job; yields it with its address and the device's token."""
    with pytest.MonkeyPatch.context() as patch:  # the bundle is as that of the recording
        patch.setitem(CODECS, "int8", PerChannel())
        export_bundles(
            build(), {TIER: Tier(1)}, folder / "bundles", example=torch.randn(4, INPUTS),
            classes=CLASSES,
        )  # fmt: skip
    bundles = BundleIndex.read(folder / "bundles")
    config = hub_config(folder, bundles)
    token = TokenFile(config.tokens).issue("recorded", TIER)
    model = build()
    model.load(bundles.folder / WEIGHTS)
    hub = Hub(config, model, LocalTrunk(model, "cpu"))
    assert config.rounds.count == ROUNDS
    async with served(hub) as url:
        yield hub, url, token
