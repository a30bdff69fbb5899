"""The benchmark of attacks: what attackers do, losses by hand, and a tiny fleet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import poison
from benchmarks.attacks import ATTACKS, Attack, AttackingRuntime, behave
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime
from edge_sdk.training.data import Examples
from server_hub.gateway.limits import Limits
from server_hub.simulation.job import Job, RoundsTable


class Still:
    """A runtime whose only tensor is 5 before training and 6 after it."""

    loading_s = 0.0

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        pass

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        return {"w": np.full(2, 6.0, np.float32)}

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {"h.q": np.ones(2, np.int8), "h.scale": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("attack", "sent"), [("scale 10", 15.0), ("scale -10", -5.0), ("zero", 0.0), ("flip", 6.0)]
)
def test_attackers_change_what_they_send(attack: str, sent: float) -> None:
    runtime = AttackingRuntime(Still(), ATTACKS[attack], {"h.q", "h.scale"})
    runtime.set_state({"w": np.full(2, 5.0, np.float32)})
    assert runtime.get_state()["w"].tolist() == [sent, sent]


def test_activations_are_multiplied_where_they_are_floats() -> None:
    runtime = AttackingRuntime(Still(), ATTACKS["activations 1e4"], {"h.q", "h.scale"})
    parts = runtime.run("train", {})
    assert (parts["h.q"].tolist(), parts["h.scale"].tolist()) == ([1, 1], [1e4, 1e4])


def test_only_attackers_flip_labels_and_lie_about_their_number() -> None:
    def load(bundle: Bundle, threads: int) -> Runtime:
        return Still()

    change = behave(Attack(flips=True, claims=Limits.samples), ["bad"], 10)
    data = Examples(np.zeros((3, 2), np.float32), np.array([0, 1, 9]))
    assert change("good", data, load) == (data, load)
    lie, _ = change("bad", data, load)
    assert len(lie) == Limits.samples
    assert lie.y.tolist() == [9, 8, 0]
    assert sum(len(batch) for batch in lie.batches(2)) == 3


def result(attack: str, attackers: int, seed: int, hub: float, small: float) -> poison.Result:
    """Return the result of a run; the large tier always has 0.9."""
    return poison.Result(attack, attackers, seed, hub, {"small": small, "large": 0.9})


def test_losses_are_means_over_the_seeds_that_are_there_of_the_worst_tier() -> None:
    results = [
        result("none", 0, 0, 0.9, 0.8), result("none", 0, 1, 0.8, 0.7),
        result("flip", 1, 0, 0.88, 0.74), result("flip", 1, 1, 0.8, 0.72),
        result("claim", 6, 0, 0.7, 0.9), result("claim", 6, 2, 0.1, 0.1),
    ]  # fmt: skip
    lost = poison.losses(results)
    assert lost["flip", 1] == (pytest.approx(1.0), pytest.approx(2.0), 2)
    assert lost["claim", 6] == (pytest.approx(20.0), pytest.approx(0.0), 1)
    assert lost.keys() == {("flip", 1), ("claim", 6)}
    rows = poison.table(results).rows
    assert [row[0] for row in rows] == ["flip", "claim"]
    assert rows[0][-2] == "yes"
    assert rows[1][-2] == "**no**"


def test_attackers_are_spread_over_the_tiers() -> None:
    job = Job.read(poison.JOB)
    assert poison.attackers_of(job, 1) == ["large-1"]
    assert poison.attackers_of(job, 4) == ["large-1", "medium-1", "small-1", "large-2"]


def test_a_tiny_fleet_is_attacked_and_finished_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Job.read(poison.JOB)
    tiers = {
        name: replace(tier, clients=1) for name, tier in whole.tiers.items() if name != "large"
    }
    tiny = replace(whole, tiers=tiers, rounds=RoundsTable(count=1), data=whole.data)
    tiny = replace(tiny, partition=replace(tiny.partition, kind="iid"))
    monkeypatch.setattr(Job, "read", lambda path: tiny)
    file = tmp_path / "poison.json"
    poison.main(file, attacks="claim", seeds=1, many=False)
    rows = json.loads(file.read_text())
    assert [(row["attack"], row["attackers"]) for row in rows] == [("none", 0), ("claim", 1)]
    monkeypatch.setattr(poison, "run", None)  # nothing is left to run
    poison.main(file, attacks="claim", seeds=1, many=False)
    assert [asdict(r) for r in poison.read(file)] == rows
