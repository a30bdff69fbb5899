"""Data whose classes, tokens or lengths are not those of the model, in a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.training.data import Examples
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.prepare import FederatedData
from server_hub.simulation.simulate import Simulation
from server_hub.trunk.settings import TrunkTraining
from tests.lib.harness import examples, save_npz
from tests.lib.models import BUILD

TEXTS = f"{__name__}:text"


def text() -> object:
    """A model of 12 tokens, with 6 positions."""
    import torch
    from torch import nn

    from export.cutting.split_model import SplitModel
    from tests.lib.models import TokenBlock

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.positions = nn.Embedding(12, 8), nn.Embedding(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places = torch.arange(x.shape[1], device=x.device)
            result: torch.Tensor = self.embedding(x) + self.positions(places)
            return result

    return SplitModel(Stem(), [TokenBlock(8) for _ in range(2)], nn.Linear(8, 12), "tokens")


def job(model: str, source: str = "none") -> Job:
    """A job of one device and one round."""
    return Job(
        model=model,
        data=DataTable(source),
        tiers={"a": FleetTier(clients=1, cut=1)},
        rounds=RoundsTable(count=1),
        local=LocalTraining(batch_size=8, hyper={"lr": 0.05}),
        trunk=TrunkTraining(device="cpu", hyper={"lr": 0.05}),
    )


def test_data_may_have_fewer_classes_than_the_model(tmp_path: Path) -> None:
    """Every way to answer is evaluated: all heads have as many logits as the model's."""
    save_npz(tmp_path / "seven.npz", examples(40, classes=7))
    with Simulation(job(BUILD, "seven.npz"), tmp_path / "run", base=tmp_path) as simulation:
        assert simulation.index.manifest("a").classes == 10
        (record,) = simulation.run()
        simulation.report()
    assert set(record.accuracy["a"]) == {"device_alone", "through_hub", "ensemble"}


def test_data_may_not_have_more(tmp_path: Path) -> None:
    """One sentence, and no run folder."""
    save_npz(tmp_path / "many.npz", examples(80, classes=13))
    with pytest.raises(ConfigError, match="the data have 13 classes; take a model with at least"):
        Simulation(job(BUILD, "many.npz"), tmp_path / "run", base=tmp_path)
    assert not (tmp_path / "run").exists()


def test_tokens_and_lengths_are_checked_before_anything_runs(tmp_path: Path) -> None:
    """In training and held-out data."""

    def data(train: int, held_out: int, length: int = 5) -> FederatedData:
        def texts(token: int) -> Examples:
            x = np.ones((9, length), np.int64)
            x[8, 2] = token
            return Examples(x, np.ones((9, length), np.int64))

        return FederatedData({"a-1": texts(train)}, texts(held_out), 12, "tokens")

    for given, says in (
        (data(-1, 1), "training data: row 8 of x at 2 is -1; the model takes 0 to 11"),
        (data(1, 12), "held-out data: row 8 of x at 2 is 12; the model takes 0 to 11"),
    ):
        with pytest.raises(DataError, match=says):
            Simulation(job(TEXTS), tmp_path / "run", data=given)
    with pytest.raises(ConfigError, match="the texts have 7 tokens, and the model takes 6"):
        Simulation(job(TEXTS), tmp_path / "run", data=data(1, 1, 7))
    assert not (tmp_path / "run").exists()
