"""The benchmark of the trunk in tiny size: both sides do the same work, and a run completes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bare_loop import BareBatch, BareLoop
from benchmarks.bare_process import MAX_NORM, RATE
from benchmarks.replay import read_batches, read_devices
from benchmarks.trunk import measure, table_of
from benchmarks.trunk_workloads import (
    CODEC,
    NAMES,
    Workload,
    cut_of,
    get_workload,
    prepare,
)
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError
from export.steps.optimizers import check_hyper
from server_hub.rounds.validation import check_packed
from server_hub.trunk.interface import StepInput, TrunkPlan
from server_hub.trunk.step import TrunkTrainer

SMALL = get_workload("small", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small workload, prepared for three devices."""
    folder = tmp_path_factory.mktemp("workload")
    prepare(SMALL, folder, 3)
    return folder


def test_prepared_batches_are_what_the_bundles_promise(folder: Path) -> None:
    """Every device has its tier, the rows of the workload, and different batches."""
    index = BundleIndex.read(folder / "bundles")
    devices = read_devices(folder)
    assert [cut_of(device.tier) for device in devices] == list(SMALL.cuts)
    seen = set()
    for device in devices:
        batches = read_batches(folder, device.name)
        manifest = index.manifest(device.tier)
        assert manifest.cut == cut_of(device.tier)
        rows = [check_packed(batch.parts, manifest)["batch"] for batch in batches]
        assert rows == [SMALL.batch] * SMALL.batches
        seen |= {batch.labels.tobytes() for batch in batches if batch.labels is not None}
    assert len(seen) == 3 * SMALL.batches


@pytest.mark.parametrize("name", ["small", "gpt2"])
def test_the_bare_loop_makes_the_trunks_steps(name: str, tmp_path: Path) -> None:
    """After the same merged steps, trunk and bare loop have the same weights."""
    workload: Workload = get_workload(name, "cpu")
    prepare(workload, tmp_path, 3)
    model = workload.model()
    start = {n: t.detach().numpy().copy() for n, t in model.trained().items()}
    trainer = TrunkTrainer(workload.model(), "cpu")
    hyper = check_hyper("sgd", {"lr": RATE})
    trainer.begin(start, TrunkPlan("sgd", hyper, max_norm=MAX_NORM))
    loop = BareLoop(model, "cpu", "fp32", "sgd", RATE, MAX_NORM)
    for number in range(2):
        inputs, bare = [], []
        for device in read_devices(tmp_path):
            cut, batch = cut_of(device.tier), read_batches(tmp_path, device.name)[number]
            inputs.append(StepInput(device.name, "shared", cut, CODEC, batch))
            bare.append(BareBatch.of(cut, CODEC, batch, "cpu"))
        loss = float(loop.step(bare))
        assert trainer.step(inputs).loss == pytest.approx(loss, rel=1e-5)
    now = model.trained()
    copies = [(n, t) for copy in trainer.finish() for n, t in copy.tensors.items()]
    assert any(np.abs(tensor - start[n]).max() > 1e-5 for n, tensor in copies)
    for n, tensor in copies:
        change, wanted = tensor - start[n], now[n].detach().numpy() - start[n]
        np.testing.assert_allclose(change, wanted, rtol=1e-3, atol=1e-6, err_msg=n)


def test_workloads_have_names() -> None:
    """An unknown name is refused with a list of the known names."""
    assert {get_workload(name, "cpu").name for name in NAMES} == set(NAMES)
    with pytest.raises(ConfigError, match="resnet18"):
        get_workload("resnet19", "cpu")


@pytest.mark.slow
def test_a_measurement_from_start_to_end() -> None:
    """With two devices, two rounds and one pair, every figure is present and plausible."""
    torch.set_num_threads(1)
    row = measure(SMALL, devices=2, device="cpu", mode="fp32", pairs=1, threads=1, rounds=2)
    assert (row.trunk, row.devices, row.mode, row.pairs) == ("small", 2, "fp32", 1)
    assert row.ratio_range == (row.ratio_to_bare_loop, row.ratio_to_bare_loop)
    # Whole rounds are slower than their steps.
    assert row.ratio_to_bare_loop < row.step_ratio
    assert row.round_overhead_s > 0
    assert row.feed_samples_per_s > row.samples_per_s > 0
    assert 0 < row.p99_ms < 60_000
    assert row.replay_cpu > 0
    assert SMALL.batch <= row.rows_per_step <= SMALL.max_rows
    assert row.ratio_to_bare_loop == pytest.approx(row.samples_per_s / row.bare_samples_per_s)
    assert json.loads(json.dumps(asdict(row)))["trunk"] == "small"
    assert table_of([row]).row_count == 1
