"""A job with devices of different runtimes, and a model with statistics and frozen layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_sdk.bundle.index import BundleIndex
from export.bundles.writer import Tier, export_bundles
from server_hub.gateway.tokens import TokenFile
from tests.lib.harness import cutlayer, examples, finish, next_event, save_npz
from tests.lib.hub_files import write_hub_toml
from tests.lib.models import CLASSES, IMAGE, build_batchnorm, example

pytestmark = pytest.mark.slow


def test_one_job_on_both_runtimes(tmp_path: Path) -> None:
    """Statistics change and are averaged, frozen layers stay, and all devices learn."""
    bundles: BundleIndex = export_bundles(
        build_batchnorm(),
        {"onnx": Tier(1, batch=16), "pte": Tier(1, runtime="executorch", batch=16)},
        tmp_path / "bundles",
        example=example(IMAGE),
        classes=CLASSES,
        model_path="tests.lib.models:build_batchnorm",
    )
    tokens = TokenFile(tmp_path / "tokens.toml")
    secrets = {tier: tokens.issue(tier, tier) for tier in bundles.tiers}
    config = write_hub_toml(tmp_path, bundles, rounds=6, devices=2)
    hub = cutlayer("hub", "--config", str(config), "--json")
    address = next_event(hub, "ready")["address"]
    devices = [
        cutlayer(
            "device", "--url", address,
            "--data", str(save_npz(tmp_path / f"{tier}.npz", examples(120, seed=i))),
            "--evaluate", str(tmp_path / "held_out.npz"),
            "--cache", str(tmp_path / "cache" / tier), "--json",
            CUTLAYER_TOKEN=secrets[tier],
        )
        for i, tier in enumerate(bundles.tiers)
    ]  # fmt: skip
    results = {}
    for tier, device in zip(bundles.tiers, devices, strict=True):
        code, out, err = finish(device)
        assert code == 0, err
        results[tier] = json.loads(out)
    code, out, err = finish(hub)
    assert code == 0, err
    rounds = [json.loads(line) for line in out.splitlines()]
    rounds = [event for event in rounds if event["event"] == "round"]
    assert all(event["devices"] == 2 and not event["dropped"] for event in rounds)
    assert rounds[-1]["local_loss"] < 0.8 * rounds[0]["local_loss"]
    measured = rounds[-1]["accuracy"]
    for tier, result in results.items():  # the same weights answer alike in both runtimes
        assert result["evaluation"]["device_alone"] == pytest.approx(
            measured[tier]["device_alone"], abs=0.021
        )
    before = load_file(bundles.folder / "model.safetensors")
    after = load_file(next((tmp_path / "run").glob("*.safetensors")))
    assert np.array_equal(before["stem.0.weight"], after["stem.0.weight"])
    for block in range(4):
        for name in ("running_mean", "running_var", "weight"):
            moved = f"block.{block}.norm.{name}"
            assert not np.allclose(before[moved], after[moved]), moved
