"""Training that diverges is called that, on devices and on the trunk; devices stay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.device import RoundReport
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime, load_runtime
from edge_sdk.transport.link import open_websocket
from export.errors import ExportError
from export.steps.optimizers import check_hyper
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.settings import LocalTraining
from server_hub.rounds.round_log import JobFailed
from server_hub.rounds.rounds import RoundRules, Rounds
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.storage.run_folder import RoundRecord
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.settings import TrunkTraining
from server_hub.trunk.step import TrunkTrainer
from tests.lib.harness import examples, hub_config, running_hub
from tests.lib.simulations import simulate
from tests.lib.trunk_models import arrival_of, dense_model, state_of


class Diverging:
    """A runtime whose first steps end in infinite weights, or in a loss that is no number."""

    loading_s = 0.0

    def __init__(self, runtime: Runtime, how: str) -> None:
        self._runtime, self._how, self._runs = runtime, how, 0

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        """Set the state."""
        self._runtime.set_state(tensors)

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        """Return the state, spoiled once."""
        state = self._runtime.get_state(slots)
        if self._how == "state" and self._runs < 10:
            self._runs = 10
            next(iter(state.values())).flat[0] = np.inf
        return state

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph; the second training step has no loss."""
        outputs = self._runtime.run(graph, batch)
        if graph == "train":
            self._runs += 1
            if self._runs == 2 and self._how == "loss":
                outputs["loss"] = np.float32(np.nan)
        return outputs


@pytest.mark.parametrize("how", ["loss", "state"])
def test_a_device_whose_training_diverged_stays(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """It declines with a sentence, keeps the state of the round's start, and trains in the next."""
    caplog.set_level(logging.WARNING)

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("phone")

        def load(bundle: Bundle, threads: int) -> Runtime:
            return Diverging(load_runtime(bundle, threads), how)  # type: ignore[return-value]

        reports: list[RoundReport] = []
        async with running_hub(config) as (hub, url):
            device = Device(
                lambda: open_websocket(url), load,
                token=token, tier="small", data=examples(24), cache=tmp_path / "cache",
            )  # fmt: skip
            await device.join()
            async with device:
                report = await device.train(reports.append)
            assert [r.round for r in report.rounds] == [2]
            assert hub.rounds.completed == 1
        said = [line for line in caplog.messages if "training diverged in round 1" in line]
        assert any("(learning rate 0.05)" in line and "phone" in line for line in said), said
        assert any("keeps the state" in line for line in said)

    asyncio.run(job())


def rounds_of(*devices: str) -> Rounds:
    """Rounds with devices that are ready."""
    rounds = Rounds(RoundRules(count=50))
    for device in devices:
        rounds.join(device)
    return rounds


def play(rounds: Rounds, diverged: set[str], delivered: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """One round in which devices diverge or deliver."""
    now = max(rounds.not_before, 0.0) + 100.0 * rounds.number
    rounds.start(now, list(rounds.ready))
    for device in sorted(diverged):
        rounds.decline(device, "training diverged in round 1", diverged=True)
    for device in sorted(delivered):
        rounds.deliver(device, now)
    rounds.close(now)
    rounds.finish()


def test_a_job_ends_when_every_device_diverges_again_and_again() -> None:
    """Five rounds in a row."""
    rounds = rounds_of("a", "b")
    for _ in range(5):
        assert not rounds.diverged
        play(rounds, {"a", "b"})
    assert rounds.diverged


@pytest.mark.parametrize(
    ("diverged", "delivered"), [({"a"}, {"b"}), ({"a"}, set()), (set(), set()), (set(), {"a", "b"})]
)
def test_a_job_goes_on_otherwise(diverged: set[str], delivered: set[str]) -> None:
    """As soon as one member does something else."""
    rounds = rounds_of("a", "b")
    for _ in range(12):
        play(rounds, diverged, delivered)
        assert not rounds.diverged


def test_a_device_cannot_end_the_job_of_others() -> None:
    """Rounds in which it is alone count only if those that have delivered before diverge, too."""
    rounds = rounds_of("good", "evil")
    play(rounds, {"evil"}, {"good"})
    rounds.leave("good", "away")
    for _ in range(8):
        play(rounds, {"evil"})
        assert not rounds.diverged
    rounds.join("good")
    play(rounds, {"evil", "good"})
    assert rounds.diverged


def job_with(**changes: object) -> Job:
    """A small job on digits."""
    job = Job(
        model="server_hub.demo.digits:build",
        data=DataTable("digits", train=60, test=20),
        tiers={"phone": FleetTier(clients=2, cut=1)},
        rounds=RoundsTable(count=8),
        local=LocalTraining(batch_size=16, hyper={"lr": 0.05}),
        trunk=TrunkTraining(device="cpu", hyper={"lr": 0.05}),
        schedule="constant",
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def test_a_simulation_whose_devices_diverge_says_so(tmp_path: Path) -> None:
    """With a learning rate that no model bears."""
    local = LocalTraining(batch_size=16, hyper={"lr": 1e36})
    with pytest.raises(JobFailed, match="diverged on every device in 5 rounds") as caught:
        simulate(job_with(local=local), tmp_path / "run")
    assert "lower lr in [local]" in str(caught.value)
    assert "(learning rate 1e+36)" in str(caught.value)


def test_a_trunk_that_diverges_refuses_no_batch_and_gives_no_tensors() -> None:
    model = dense_model()
    hyper = check_hyper("sgd", {"lr": 1e36, "weight_decay": 1e36})
    trainer = TrunkTrainer(model, "cpu")
    trainer.begin(state_of(model), TrunkPlan("sgd", hyper, returned=True))
    batches = [arrival_of(model, 1 + n, 4, n) for n in range(3)]
    assert trainer.step(batches).diverged == []
    for _ in range(2):
        report = trainer.step(batches)
        assert (report.rows, report.refused) == (0, {})
        assert report.diverged == [batch.device for batch in batches]
        assert report.gradients == report.losses == [None] * 3
    copies = trainer.finish()
    assert copies
    assert all(copy.diverged and not copy.tensors for copy in copies)


def test_a_simulation_whose_trunk_diverges_says_so(tmp_path: Path) -> None:
    """No device is blamed."""
    records: list[RoundRecord] = []
    trunk = TrunkTraining(device="cpu", hyper={"lr": 1e36})
    with pytest.raises(JobFailed, match="diverged on the trunk in round 5") as caught:
        simulate(job_with(trunk=trunk), tmp_path / "run", on_round=records.append)
    assert "lower lr in [trunk]" in str(caught.value)
    assert [(record.devices, record.dropped) for record in records] == [(2, {})] * 4


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        ("sgd", {"lr": -0.1}),
        ("sgd", {"lr": float("nan")}),
        ("sgd", {"lr": float("inf")}),
        ("sgd", {"momentum": 1.0}),
        ("adamw", {"beta1": 1.5}),
        ("adamw", {"weight_decay": -1.0}),
    ],
)
def test_hyper_parameters_have_ranges(optimizer: str, hyper: dict[str, float]) -> None:
    """The message has name and value."""
    (name,) = hyper
    with pytest.raises(ExportError, match=f"{name} of {optimizer} is"):
        check_hyper(optimizer, hyper)
