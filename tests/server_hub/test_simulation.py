"""Simulated jobs: repeatable, resumable, right about time, with clear errors for invalid jobs."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from edge_sdk.cli.main import main
from edge_sdk.errors import ConfigError, CutlayerError, DataError
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from server_hub.methods.registry import simulated_methods
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.checkpoint import FILE, Checkpoint
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.devices import Meter
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.simulate import Simulation
from server_hub.simulation.trunk import flop_above
from server_hub.storage.run_folder import RoundRecord, read_records
from server_hub.trunk.settings import TrunkTraining
from tests.lib.models import (
    BUILD,
    CLASSES,
    IMAGE,
    MeanHead,
    NormBlock,
    build,
    build_batchnorm,
    example,
)
from tests.lib.simulations import Interrupted, assert_alike, in_time, simulate, stop_after

UNEQUAL = {
    "small": FleetTier(
        clients=3, cut=1, gflops=0.01, uplink_mbit=1, downlink_mbit=4, latency_ms=20
    ),
    "large": FleetTier(clients=2, cut=3, codec="fp16", gflops=0.1, uplink_mbit=10, latency_ms=5),
}


def job(**changes: Any) -> Job:
    """Return a job of five devices of two tiers, 160 digits, and two rounds."""
    settings: dict[str, Any] = {
        "model": BUILD,
        "data": DataTable("digits", train=160, test=60),
        "tiers": UNEQUAL,
        "rounds": RoundsTable(count=2),
        "local": LocalTraining(batch_size=8),
    }
    return Job(**settings | changes)


def repeatable(record: RoundRecord) -> dict[str, Any]:
    """Return a record without values of real time."""
    table = asdict(record)
    for real in ("wall_s", "seconds"):
        del table["costs"][real]
    return table


def model_in(folder: Path) -> dict[str, Array]:
    """Return the tensors of the trained model."""
    tensors: dict[str, Array] = load_file(folder / "model.safetensors")
    return tensors


def assert_same_model(one: Path, other: Path, atol: float = 0.0) -> None:
    """Check that models are equal bit for bit, or within ``atol``."""
    a, b = model_in(one), model_in(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=atol, err_msg=name)


# --- repeatable -----------------------------------------------------------------------------------

RESTLESS = {
    "small": replace(UNEQUAL["small"], clients=6, loss=0.001, online_s=6.0, offline_s=4.0),
    "large": replace(UNEQUAL["large"], clients=2, online_s=20.0, offline_s=5.0),
}


def restless(**changes: Any) -> Job:
    """Return a job whose devices are offline 40 % of the time and seldom online for a round."""
    settings = {
        "tiers": RESTLESS,
        "rounds": RoundsTable(count=4),
        "local": LocalTraining(batch_size=8, epochs=2),
    }
    return job(**settings | changes)


def test_a_run_with_loss_and_absences_is_the_same_every_time(tmp_path: Path) -> None:
    first = simulate(restless(), tmp_path / "first")
    again = simulate(restless(), tmp_path / "again")
    assert [repeatable(r) for r in first] == [repeatable(r) for r in again]
    assert_same_model(tmp_path / "first", tmp_path / "again")
    other = simulate(restless(seed=1), tmp_path / "other")
    assert [r.clock for r in other] != [r.clock for r in first]


def test_devices_that_vanish_are_named_and_the_rounds_go_on(tmp_path: Path) -> None:
    records = simulate(restless(), tmp_path / "run")
    assert [r.round for r in records] == [1, 2, 3, 4]
    dropped = [device for r in records for device in r.dropped]
    assert dropped, "the job is made so that somebody vanishes"
    names = {f"{tier}-{i + 1}" for tier, t in RESTLESS.items() for i in range(t.clients)}
    assert set(dropped) <= names
    for record in records:
        assert 1 <= record.devices
        assert record.devices + len(record.dropped) <= len(names)
        assert all(reason for reason in record.dropped.values())


def test_who_joins_late_over_a_slow_link_comes_at_the_same_time_in_every_run(
    tmp_path: Path,
) -> None:
    """Rounds pass while it downloads the state, so it must request the current one again."""
    tiers = {
        "quick": FleetTier(clients=2, cut=1),
        "slow": FleetTier(
            clients=3, cut=3, downlink_mbit=0.05, latency_ms=10, online_s=40.0, offline_s=5.0
        ),
    }
    quick = replace(tiers["quick"], gflops=0.05)
    task = job(tiers=tiers | {"quick": quick}, rounds=RoundsTable(count=12), evaluate_every=12)
    first = simulate(task, tmp_path / "first")
    again = simulate(task, tmp_path / "again")
    assert [repeatable(r) for r in first] == [repeatable(r) for r in again]


# --- runtimes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_functional_steps_and_exported_graphs_train_the_same_model(tmp_path: Path) -> None:
    task = job(data=DataTable("digits", train=80, test=60), tiers={"small": UNEQUAL["small"]})
    torch_records = simulate(task, tmp_path / "torch", "torch")
    onnx_records = simulate(task, tmp_path / "onnx", "onnx")
    for one, other in zip(torch_records, onnx_records, strict=True):
        assert one.seconds == pytest.approx(other.seconds, rel=1e-3)
        assert one.local_loss == pytest.approx(other.local_loss, rel=1e-3)
        for tier, paths in one.accuracy.items():
            assert paths == pytest.approx(other.accuracy[tier], abs=1.5 / 60)
    a, b = model_in(tmp_path / "torch"), model_in(tmp_path / "onnx")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4, err_msg=name)


# --- resuming -------------------------------------------------------------------------------------


LONG = job(rounds=RoundsTable(count=4, per_round=3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate(LONG, folder)
    return folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted after the second of four rounds."""
    folder = tmp_path_factory.mktemp("halves") / "run"
    with pytest.raises(Interrupted):
        simulate(LONG, folder, on_round=stop_after(2))
    assert [r.round for r in read_records(folder)] == [1, 2]
    return folder


def assert_goes_on_like(folder: Path, whole: Path) -> None:
    """Check that a run resumed in ``folder`` ends like the uninterrupted one."""
    last = Checkpoint.read(folder)
    assert last is not None
    done = read_records(folder)[: last.completed]
    records = simulate(LONG, folder)
    assert records[: len(done)] == done
    assert read_records(folder) == records
    assert_alike(records, read_records(whole))
    assert_same_model(folder, whole, atol=1e-5)
    clocks = [r.clock for r in records]
    assert clocks == sorted(clocks)


def test_an_interrupted_run_goes_on_to_the_same_end(
    whole: Path, halves: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(halves, tmp_path / "run")
    assert_goes_on_like(folder, whole)
    before = (folder / "metrics.jsonl").read_bytes()
    assert_alike(simulate(LONG, folder), read_records(whole))  # no round is left to run
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_a_run_that_was_stopped_by_hand_goes_on(
    whole: Path, tmp_path: Path, interrupt: type[BaseException]
) -> None:
    def on_round(record: RoundRecord) -> None:
        raise interrupt

    folder = tmp_path / "run"
    for done in (1, 2):  # twice
        with pytest.raises(interrupt):
            simulate(LONG, folder, on_round=on_round)
        assert [r.round for r in read_records(folder)] == list(range(1, done + 1))
    assert_goes_on_like(folder, whole)


@pytest.mark.parametrize("torn", ['{"round": 3, "clo', "", '{"round": 3}'])
def test_a_line_that_was_cut_off_is_written_anew(
    whole: Path, halves: Path, tmp_path: Path, torn: str
) -> None:
    folder = shutil.copytree(halves, tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert_goes_on_like(folder, whole)


def test_a_round_that_is_in_the_metrics_but_not_in_the_checkpoint_is_made_again(
    whole: Path, halves: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(halves, tmp_path / "run")
    third = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)[2]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(third)
    assert_goes_on_like(folder, whole)


def test_metrics_that_lack_a_round_of_the_checkpoint_are_not_gone_on_with(
    halves: Path, tmp_path: Path
) -> None:
    """The line is written before the checkpoint; a failed disk may have lost it."""
    folder = shutil.copytree(halves, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    with pytest.raises(ConfigError):
        simulate(LONG, folder)


def test_the_metrics_of_a_checkpoint_that_are_gone_are_told(halves: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(halves, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError):
        simulate(LONG, folder)


def test_the_checkpoints_numbers_are_those_of_the_last_round(halves: Path) -> None:
    last, record = Checkpoint.read(halves), read_records(halves)[-1]
    assert last is not None
    assert (last.number, last.completed, last.clock) == (2, 2, record.clock)
    assert last.up == {kind: n["up"] for kind, n in record.bytes.items()}
    assert last.down == {kind: n["down"] for kind, n in record.bytes.items()}
    costs = {k: v for k, v in record.costs.items() if k != "wall_s"}
    assert last.meter == Meter(**costs)
    for name, tensor in model_in(halves).items():
        np.testing.assert_array_equal(last.stores["all"][name], tensor)


def test_both_stores_of_the_papers_form_are_kept(tmp_path: Path) -> None:
    task = replace(LONG, method="fedsplitx-paper", rounds=RoundsTable(count=3))
    with pytest.raises(Interrupted):
        simulate(task, tmp_path / "halves", on_round=stop_after(1))
    records = simulate(task, tmp_path / "halves")
    assert_alike(records, simulate(task, tmp_path / "whole"))
    for tier in UNEQUAL:
        a, b = (load_file(tmp_path / run / f"model.{tier}.safetensors") for run in
                ("halves", "whole"))  # fmt: skip
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"method": "exc"}, {"rounds": RoundsTable(count=5, per_round=3)}]
)
def test_the_folder_of_another_job_is_refused(halves: Path, other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="another job"):
        Simulation(replace(LONG, **other), halves)


def test_the_folder_of_another_runtime_is_refused(halves: Path) -> None:
    with pytest.raises(ConfigError, match="another job"):
        Simulation(LONG, halves, "onnx")


def test_a_folder_with_something_else_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        Simulation(LONG, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError):
        Simulation(LONG, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut off", "empty", "other tensors", "flipped"])
def test_a_damaged_checkpoint_is_refused(halves: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(halves, tmp_path / "run")
    path = folder / FILE
    data = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other tensors":
        shutil.copy(folder / "model.safetensors", path)
    else:
        path.write_bytes(data[:8] + bytes([data[8] ^ 0xFF]) + data[9:])
    with pytest.raises(ConfigError, match="remove"):
        Simulation(LONG, folder)


def test_a_job_that_was_refused_does_not_take_the_folder(tmp_path: Path) -> None:
    wrong = replace(LONG, tiers={"small": replace(UNEQUAL["small"], cut=9)}, rounds=RoundsTable(1))
    right = replace(wrong, tiers={"small": UNEQUAL["small"]})
    with pytest.raises(ExportError, match="cut 9"):
        Simulation(wrong, tmp_path / "run")
    with Simulation(right, tmp_path / "run"):
        pass


# --- virtual time ---------------------------------------------------------------------------------

ONE = FleetTier(clients=1, cut=2, gflops=0.05, uplink_mbit=2, downlink_mbit=8, latency_ms=30)


def alone(tier: FleetTier = ONE, **changes: Any) -> Job:
    """Return a job of one device with 80 digits and three rounds, without any overlap."""
    settings = {
        "tiers": {"one": tier},
        "data": DataTable("digits", train=80, test=20),
        "rounds": RoundsTable(count=3),
        "schedule": "constant",
    }
    return job(**settings | changes)


def last_round(records: list[RoundRecord]) -> tuple[float, dict[str, dict[str, int]], float, float]:
    """Return seconds, bytes, and operations of devices and of the trunk in the last round."""
    before, last = records[-2:]
    sizes = {
        kind: {way: n - before.bytes[kind][way] for way, n in ways.items()}
        for kind, ways in last.bytes.items()
    }
    device, trunk = (last.costs[k] - before.costs[k] for k in ("device_flop", "trunk_flop"))
    return last.seconds, sizes, device, trunk


def on_the_way(size: int, mbit: float | None) -> float:
    """Return the seconds that ``size`` bytes take."""
    return 0.0 if mbit is None else size * 8 / (mbit * 1e6)


def straight(tier: FleetTier, sizes: dict[str, dict[str, int]]) -> float:
    """Return the seconds of a round's messages that wait for each other: round, state, update."""
    return (
        on_the_way(sizes["round"]["down"] + sizes["blob"]["down"], tier.downlink_mbit)
        + on_the_way(sizes["blob_get"]["up"] + sizes["update"]["up"], tier.uplink_mbit)
        + 4 * tier.latency_ms / 1000
    )


def acknowledgements(tier: FleetTier, sizes: dict[str, dict[str, int]]) -> float:
    """Return the seconds by which acknowledgements may delay the other messages."""
    ack = sizes["ack"]
    return on_the_way(ack["up"], tier.uplink_mbit) + on_the_way(ack["down"], tier.downlink_mbit)


@pytest.mark.parametrize("loss", [0.0, 0.02])
def test_a_round_takes_as_long_as_its_parts(tmp_path: Path, loss: float) -> None:
    """Without activations, the state comes down, the device trains, and the update goes up."""
    tier = replace(ONE, loss=loss)
    seconds, sizes, flop, _ = last_round(simulate(alone(tier, method="exc"), tmp_path / "run"))
    felt = replace(
        tier,
        uplink_mbit=tier.bytes_per_second(tier.uplink_mbit) * 8e-6,
        downlink_mbit=tier.bytes_per_second(tier.downlink_mbit) * 8e-6,
    )
    assert (felt == tier) == (loss == 0.0)
    least = straight(felt, sizes) + flop / 0.05e9
    assert least - 1e-6 <= seconds <= least + acknowledgements(felt, sizes) + 1e-6


def test_a_device_that_is_half_as_fast_computes_twice_as_long(tmp_path: Path) -> None:
    times = {}
    for gflops in (0.05, 0.025):
        records = simulate(alone(replace(ONE, gflops=gflops), method="exc"), tmp_path / f"{gflops}")
        times[gflops], _, flop, _ = last_round(records)
    assert times[0.025] - times[0.05] == pytest.approx(flop / 0.05e9, rel=1e-6)


def test_batches_that_wait_for_gradients_take_the_sum_of_all_their_parts(tmp_path: Path) -> None:
    """A batch goes up, through the trunk and down again before the next: ten times."""
    task = alone(method="splitfed-v1", hub_gflops=0.2)
    seconds, sizes, flop, trunk_flop = last_round(simulate(task, tmp_path / "run"))
    least = (
        straight(ONE, sizes)
        + flop / 0.05e9
        + trunk_flop / 0.2e9
        + on_the_way(sizes["activations"]["up"], ONE.uplink_mbit)
        + on_the_way(sizes["gradient"]["down"], ONE.downlink_mbit)
        + 10 * 2 * ONE.latency_ms / 1000
    )
    assert least - 1e-6 <= seconds <= least + acknowledgements(ONE, sizes) + 1e-6


def test_activations_go_up_while_the_device_trains(tmp_path: Path) -> None:
    """If the uplink is the bottleneck, the time of training is hidden after the first batch."""
    tier = replace(ONE, uplink_mbit=0.5, gflops=1.0)
    task = alone(tier, trunk=TrunkTraining(wait_s=0.0))
    seconds, sizes, flop, _ = last_round(simulate(task, tmp_path / "run"))
    upload = on_the_way(sizes["activations"]["up"], tier.uplink_mbit)
    assert upload > 5 * flop / 1e9, "the uplink is the bottleneck"
    least = straight(tier, sizes) + upload + flop / 10 / 1e9
    assert least - 1e-6 <= seconds <= least + acknowledgements(tier, sizes) + 1e-6


def test_a_slow_hub_is_waited_for(tmp_path: Path) -> None:
    """Only the trunk takes time; it trains on all rows of the round."""
    tier = FleetTier(clients=1, cut=2)
    task = alone(tier, hub_gflops=0.01, trunk=TrunkTraining(wait_s=0.0))
    seconds, _, _, flop = last_round(simulate(task, tmp_path / "run"))
    model = build_model_with_head(2)
    per_row = flop_above(model, [2], example(IMAGE))[2]
    assert flop == 3 * per_row * 80
    assert seconds == pytest.approx(flop / 0.01e9, rel=1e-6)


def build_model_with_head(cut: int) -> SplitModel:
    """Return the job's model with the auxiliary head at a cut."""
    model = build()
    model.add_heads([cut], example(IMAGE), CLASSES)
    return model


def test_counting_operations_leaves_the_model_in_its_mode() -> None:
    model = build_batchnorm()
    model.add_heads([2], example(IMAGE), CLASSES)
    modes = {name: module.training for name, module in model.named_modules()}
    flop_above(model, [1, 2, 3], example(IMAGE))
    assert {name: module.training for name, module in model.named_modules()} == modes


def build_norms_on_the_hub() -> SplitModel:
    """Return a model with batch norms above cut 2 only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Conv2d(IMAGE[0], 8, 3, padding=1)
        plain = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(2)]
        return SplitModel(stem, [*plain, NormBlock(8), NormBlock(8)], MeanHead(8, CLASSES))


def test_the_trunks_batch_norms_learn(tmp_path: Path) -> None:
    simulate(alone(model=f"{__name__}:build_norms_on_the_hub"), tmp_path / "run")
    before = build_norms_on_the_hub().state_dict()
    after = model_in(tmp_path / "run")
    for name in ("block.2.norm.running_mean", "block.3.norm.running_var"):
        assert not np.allclose(after[name], before[name].numpy()), name


# --- many devices ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_devices_join_and_some_train(tmp_path: Path) -> None:
    tiers = {
        "small": replace(UNEQUAL["small"], clients=120),
        "large": replace(UNEQUAL["large"], clients=80),
    }
    task = job(
        tiers=tiers,
        data=DataTable("digits", train=800, test=20),
        rounds=RoundsTable(count=1, per_round=20),
    )
    [record] = simulate(task, tmp_path / "run")
    assert record.devices == 20
    assert record.dropped == {}
    one = simulate(replace(task, tiers={"small": replace(UNEQUAL["small"], clients=1)},
                           rounds=RoundsTable(1)), tmp_path / "one")  # fmt: skip
    for kind, way in (("hello", "up"), ("welcome", "down"), ("ready", "up")):
        assert record.bytes[kind][way] >= 200 * (one[0].bytes[kind][way] - 8), "everybody came"


# --- invalid jobs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "gossip"}, "gossip"),
        ({"rounds": RoundsTable(per_round=6)}, "per_round"),
        ({"tiers": {}}, "no tiers"),
        ({"hub_gflops": 0.0}, "hub_gflops"),
        ({"hub_gflops": float("nan")}, "hub_gflops"),
        ({"evaluate_every": 0}, "evaluate_every"),
    ],
)
def test_a_job_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        job(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clients": 0}, "clients"),
        ({"cut": 0}, "cut"),
        ({"gflops": 0.0}, "gflops"),
        ({"gflops": float("nan")}, "gflops"),
        ({"online_s": 0.0}, "online_s"),
        ({"online_s": float("inf")}, "online_s"),
        ({"online_s": 1.0, "offline_s": float("inf")}, "offline_s"),
        ({"online_s": 1.0, "offline_s": float("nan")}, "offline_s"),
        ({"offline_s": -1.0}, "offline_s"),
        ({"offline_s": 1.0}, "online_s"),
    ],
)
def test_a_tier_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FleetTier(**{"clients": 1, "cut": 1} | changes)


def build_for_colour() -> SplitModel:
    """Return a model of images with three channels; digits have one channel."""
    stem = nn.Conv2d(3, 6, 3)
    return SplitModel(stem, [nn.Identity(), nn.Identity()], MeanHead(6, CLASSES))


def build_for_three_classes() -> SplitModel:
    """Return a model of three classes; digits have ten classes."""
    stem = nn.Conv2d(1, 6, 3)
    return SplitModel(stem, [nn.Identity(), nn.Identity()], MeanHead(6, 3))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tiers": {"a": FleetTier(clients=2, cut=4)}}, ExportError, "cut 4"),
        ({"tiers": {"a": FleetTier(clients=2, cut=5)}, "method": "fedavg"}, ExportError, "cut 5"),
        ({"tiers": {"a": FleetTier(clients=161, cut=1)}}, ConfigError, "161"),
        ({"model": "tests.lib.models:nothing"}, ConfigError, "nothing"),
        ({"model": f"{__name__}:build_for_colour"}, CutlayerError, "channels"),
        ({"model": f"{__name__}:build_for_three_classes", "method": "fedavg"}, CutlayerError, "3"),
        ({"model": f"{__name__}:build_for_three_classes"}, CutlayerError, "3"),
        ({"data": DataTable("nowhere.npz")}, DataError, "nowhere"),
        ({"local": LocalTraining(hyper={"rate": 0.1})}, ValueError, "rate"),
        ({"trunk": TrunkTraining(hyper={"rate": 0.1})}, ValueError, "rate"),
    ],
)
def test_a_job_that_does_not_fit_is_told_in_a_sentence_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with in_time(), pytest.raises(error, match=says):
        Simulation(job(**{"tiers": {"a": FleetTier(clients=2, cut=1)}} | changes), tmp_path / "run")


def test_text_has_no_labels_to_learn(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"A paragraph, number {i}." for i in range(40)))
    with pytest.raises(ConfigError, match="labels"):
        Simulation(job(data=DataTable(str(tmp_path / "text.txt"))), tmp_path / "run")


def test_training_that_diverges_on_all_devices_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="diverged"):
        simulate(job(local=LocalTraining(hyper={"lr": 1e30})), tmp_path / "run")


def test_rounds_that_nobody_can_deliver_in_time_end_with_an_error(tmp_path: Path) -> None:
    tiers = {"slow": FleetTier(clients=2, cut=1, gflops=1e-4)}
    task = job(tiers=tiers, rounds=RoundsTable(count=2, deadline_s=5.0))
    with pytest.raises(CutlayerError):
        simulate(task, tmp_path / "run")


# --- the command ----------------------------------------------------------------------------------

TOML = """
model = "tests.lib.models:build"
[data]
source = "digits"
train = 80
test = 20
[rounds]
count = 1
[tiers.small]
clients = 2
cut = 1
"""


@pytest.mark.parametrize(
    ("old", "new", "options", "says"),
    [
        ("cut = 1", "cut = 4", [], "cut 4"),
        ("clients = 2", "clients = 0", [], "clients is 0"),
        ("clients = 2", "clients = 81", [], "81"),
        ("cut = 1", "cut = 1\ncolour = 3", [], "colour"),
        ("[data]", "hub_gflops = 0\n[data]", [], "hub_gflops"),
        ("[data]", "method = 'gossip'\n[data]", [], "gossip"),
        ("count = 1", "count = 1\nper_round = 3", [], "per_round"),
        ("cut = 1", "cut = 'one'", [], "cut"),
        ("", "", ["--method", "gossip"], "gossip"),
        ("", "", ["--runtime", "abacus"], "abacus"),
    ],
)
def test_the_command_says_in_one_sentence_what_is_wrong(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    options: list[str],
    says: str,
) -> None:
    assert old in TOML
    (tmp_path / "job.toml").write_text(TOML.replace(old, new, 1))
    arguments = ["simulate", str(tmp_path / "job.toml"), "--run", str(tmp_path / "run"), *options]
    with in_time(), pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cutlayer: ")
    assert says in lines[0]


def test_the_command_runs_a_job_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    folder = tmp_path / "run"
    arguments = ["simulate", str(tmp_path / "job.toml"), "--run", str(folder), "--json"]
    with in_time(), pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code, capsys.readouterr().err
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    for name in ("metrics.jsonl", "model.safetensors", "report.md", "curves.png", "partition.png"):
        assert (folder / name).stat().st_size > 0, name
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_every_method_is_known_by_name() -> None:
    for name in simulated_methods():
        assert job(method=name).method == name
