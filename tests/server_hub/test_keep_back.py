"""Simulated devices that keep examples back: what they say is right, also in a resumed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.errors import ConfigError
from edge_sdk.training.local_data import is_kept_back
from server_hub.methods.settings import LocalTraining
from server_hub.reports.report import write_report
from server_hub.reports.rounds import devices_table, round_line, rounds_table
from server_hub.reports.tensorboard import scalars
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable, SplitMixTable
from server_hub.simulation.prepare import describe, put_down, resume
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import RunFolder
from tests.lib.models import BUILD, build
from tests.lib.records import record
from tests.lib.simulations import Interrupted, assert_alike, simulate, stop_after

SHARE = 0.25
KEYS = {
    "model", "data", "tiers", "partition", "method", "optimizer", "rounds", "local", "trunk",
    "cuts", "mix", "hub_gflops", "schedule", "evaluate_every", "seed",
}  # fmt: skip
"""The keys of a job in the first version."""


def job(**changes: Any) -> Job:
    """Return a job of five devices of two tiers that keep a quarter of 200 digits back."""
    settings: dict[str, Any] = {
        "model": BUILD,
        "data": DataTable("digits", train=200, test=40),
        "tiers": {
            "small": FleetTier(clients=3, cut=1, gflops=0.01, uplink_mbit=1, latency_ms=20),
            "large": FleetTier(clients=2, cut=3, codec="fp16", latency_ms=5),
        },
        "rounds": RoundsTable(count=3),
        "local": LocalTraining(batch_size=8),
        "evaluate_every": 2,
        "keep_back": SHARE,
    }
    return Job(**settings | changes)


def test_what_devices_say_agrees_with_the_saved_model(tmp_path: Path) -> None:
    """Through the hub, the rows that each device keeps back are answered by the whole model."""
    with Simulation(job(), tmp_path / "run") as simulation:
        first, second, last = simulation.run()
        clients, data = simulation.clients, simulation.data.train
    assert not first.on_devices, "an evaluation is due after every second round"
    assert second.on_devices["answered"] == last.on_devices["answered"] == 5
    model = build()
    model.load(tmp_path / "run" / "model.safetensors")
    for tier, said in last.on_devices["tiers"].items():
        right, counts = [], []
        for client in (client for client in clients if client.tier == tier):
            kept = client.rows[is_kept_back(np.arange(len(client.rows)), SHARE)]
            with torch.no_grad():
                answers = model.eval()(torch.from_numpy(data.x[kept])).argmax(1).numpy()
            right.append(float((answers == data.y[kept]).mean()))
            counts.append(len(kept))
        assert (said["devices"], said["labels"]) == (len(counts), sum(counts))
        figures = said["paths"]["through_hub"]
        flipped = 1.5 / min(counts)  # activations are packed on their way
        assert figures["mean"] == pytest.approx(np.average(right, weights=counts), abs=flipped)
        assert figures["p50"] == pytest.approx(np.median(right), abs=flipped)


def test_a_resumed_run_says_the_same(tmp_path: Path) -> None:
    """Although devices evaluate between two rounds."""
    whole = simulate(job(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        simulate(job(), tmp_path / "run", on_round=stop_after(2))
    again = simulate(job(), tmp_path / "run")
    assert_alike(again, whole)
    for one, other in zip(again, whole, strict=True):
        assert one.device_means.keys() == other.device_means.keys()
        for tier, paths in one.device_means.items():
            assert paths == pytest.approx(other.device_means[tier], abs=0.1)


def test_a_run_of_a_version_without_these_keys_is_the_same_job() -> None:
    """So that it resumes; it decayed all parameters. With a key that is set it is another job."""

    def described(**changes: Any) -> dict[str, Any]:
        settings = {"keep_back": 0.0, "decay": "all", **changes}
        found: dict[str, Any] = json.loads(describe(job(**settings), "torch"))["job"]
        return found

    plain = described()
    assert plain.keys() == KEYS
    assert plain["local"].keys() == {"epochs", "batch_size", "hyper", "staleness"}
    assert described(keep_back=SHARE) == plain | {"keep_back": SHARE}
    assert described(decay="matrices") == plain | {"decay": "matrices"}
    clipped = described(local=LocalTraining(max_norm=2.0))["local"]
    assert clipped["max_norm"] == 2.0


def test_a_run_from_before_decay_says_how_to_go_on(tmp_path: Path) -> None:
    """Its job decayed all parameters; the default leaves norms, biases and embeddings alone."""
    put_down(tmp_path, describe(job(decay="all"), "torch"))
    with pytest.raises(ConfigError, match='add decay = "all" to the job to go on with it'):
        resume(tmp_path, describe(job(), "torch"))
    with pytest.raises(ConfigError, match="a run of another job"):
        resume(tmp_path, describe(job(seed=1), "torch"))
    assert resume(tmp_path, describe(job(decay="all"), "torch")) is None


def test_an_evaluation_costs_no_download_where_a_round_or_the_end_follows(tmp_path: Path) -> None:
    every = {"evaluate_every": 1, "rounds": RoundsTable(count=2)}
    with_it = simulate(job(**every), tmp_path / "with")[-1].bytes
    without = simulate(job(**every, keep_back=0.0), tmp_path / "without")[-1].bytes
    assert with_it["evaluated"]["up"] > 0
    assert with_it["blob"] == without["blob"]


def test_a_device_with_one_example_trains_on_it(tmp_path: Path) -> None:
    """And has nothing to evaluate on; it does not end the run."""
    small = job(
        data=DataTable("digits", train=5, test=10),
        tiers={"small": FleetTier(clients=5, cut=1)},
        rounds=RoundsTable(count=1),
        keep_back=0.9,
    )
    (only,) = simulate(small, tmp_path / "run")
    assert only.devices == 5
    assert not only.on_devices


@pytest.mark.parametrize("cut", [4, 2])
def test_base_networks_are_evaluated_as_a_mixture(tmp_path: Path, cut: int) -> None:
    """On devices that hold whole bases, and through the hub on those that hold cut ones."""
    mixed = job(
        method="splitmix",
        tiers={"small": FleetTier(clients=2, cut=cut, budget=0.5)},
        mix=SplitMixTable(bases=2),
        rounds=RoundsTable(count=1),
    )
    (only,) = simulate(mixed, tmp_path / "run")
    said = only.on_devices["tiers"]["small"]
    assert said["devices"] == 2
    assert list(said["paths"]) == ["mix"]


# --- reports --------------------------------------------------------------------------------------

SAID = {
    "asked": 5, "answered": 3, "silent": 1, "without": 2,
    "tiers": {
        "a": {
            "devices": 3, "labels": 70,
            "paths": {
                "device_alone": {"mean": 30.0, "p10": 20.0, "p50": 29.0, "p90": 41.0},
                "through_hub": {"mean": 15.5, "p10": 11.0, "p50": 15.0, "p90": 21.0},
            },
        }
    },
}  # fmt: skip


def test_reports_show_what_devices_say(tmp_path: Path) -> None:
    """Beside the hub's own figures, or without any."""
    beside, alone = record(1, on_devices=SAID), record(2, on_devices=SAID, accuracy={})
    assert "b 40  a on devices 15.5" in round_line(beside)
    assert "perplexity a on devices 15.5" in round_line(alone)
    assert scalars(alone)["perplexity on devices/a/through_hub/p90"] == 21.0
    table = rounds_table([alone])
    assert table.title.endswith("on what devices keep back")
    assert "30/15.5" in table.rows[0]
    assert "30/15.5" not in rounds_table([beside]).rows[0]
    rows = devices_table(alone).rows
    assert rows[1] == ["a", "through hub", "15.5", "11", "15", "21", "3", "70"]
    for name, records in (("beside", [beside]), ("alone", [alone]), ("both", [beside, alone])):
        run = RunFolder(tmp_path / name, metric="perplexity")
        for each in records:
            run.add(each)
        run.write()
        write_report(run, "SplitFT")
        text = (tmp_path / name / "report.md").read_text("utf-8")
        assert "Perplexity on what devices keep back, as they say" in text
        assert "3 of 5 devices that were asked" in text
        assert (tmp_path / name / "curves.png").stat().st_size > 1000
