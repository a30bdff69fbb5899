"""The demo with digits: FedSplitX over six devices of three tiers, and the same without a hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from edge_sdk.inference.metrics import Metric
from export.bundles.writer import Tier
from server_hub.demo import digits
from server_hub.demo.runner import DemoDevice, DemoRun, Setup, check_saved_model
from server_hub.methods.settings import LocalTraining
from server_hub.reports.table import Table
from server_hub.reports.values import PATHS
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.digits import CLASSES, load
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.prepare import FederatedData
from server_hub.simulation.simulate import Simulation

TIERS = {"small": Tier(cut=1), "medium": Tier(cut=3), "large": Tier(cut=5)}
DEVICES_PER_TIER = 2
ALPHA = 1.0
"""Dirichlet parameter of the partition: devices have unequal amounts and mixes of classes."""

KEEP_BACK = 0.1
"""Share of its digits that a device keeps back, and evaluates the model on."""

HYPER = {"lr": 0.03}
BATCH = 16
MERGED_ROWS = 64


@dataclass(frozen=True)
class DigitsDemo:
    """FedSplitX on handwritten digits.

    Attributes:
        rounds: rounds of federated training.
    """

    rounds: int = 40
    title: ClassVar[str] = "FedSplitX over six devices of three tiers, on digits"
    metric: ClassVar[Metric] = "accuracy"

    def prepare(self, run: DemoRun) -> Setup:
        """Deal the digits out to the devices."""
        train, held_out = load()
        tiers = [tier for tier in TIERS for _ in range(DEVICES_PER_TIER)]
        run.step(f"data: {len(train)} digits on {len(tiers)} devices, {len(held_out)} held out")
        held_out_file = str(run.folder / "held_out.npz")
        options = ("--keep-back", str(KEEP_BACK), "--evaluate", held_out_file, "--json")
        shares = digits.partition(train, len(tiers), ALPHA)
        return Setup(
            model=digits.build_for_demo(),
            example=train.x[:64],
            held_out=held_out,
            devices=[
                DemoDevice(f"{tier}-{i % DEVICES_PER_TIER + 1}", tier, share, options)
                for i, (tier, share) in enumerate(zip(tiers, shares, strict=True))
            ],
            tiers=TIERS,
            export={"classes": CLASSES, "model_path": digits.MODEL},
            hub={
                "local": {"batch_size": BATCH, "hyper": HYPER},
                "trunk": {"max_rows": MERGED_ROWS, "hyper": HYPER, "threads": 1},
            },
        )

    def measure(self, run: DemoRun) -> dict[str, Any]:
        """Accuracy by tier and path, of the saved model, and of the same devices without a hub."""
        held_out = run.setup.held_out
        tiers = {
            name: {"cut": entry.cut, **_mean_evaluation(run.reports, name)}
            for name, entry in run.index.tiers.items()
        }
        with torch.no_grad():
            answers = run.trained_model()(torch.from_numpy(held_out.x)).argmax(1).numpy()
        saved = float((answers == held_out.y).mean())
        through_hub = {name: tier["through_hub"] for name, tier in tiers.items()}
        check_saved_model(saved, through_hub, self.metric)
        run.step("the same devices without a hub: the poorest tier's model, by federated averaging")
        with run.console.status("training"):
            no_hub = self._without_hub(run)
        return {"tiers": tiers, "no_hub": no_hub, "saved_model": saved}

    def _without_hub(self, run: DemoRun) -> float:
        """Accuracy of the model that fits the poorest tier, trained by all devices alone.

        Examples, weights, rounds, batches, learning rates and seeds are those of the run.
        """
        poorest = min(TIERS, key=lambda tier: TIERS[tier].cut)
        # A hub numbers its devices, and their seeds, in the order of their names.
        devices = sorted(run.setup.devices, key=lambda device: device.name)
        shares = {f"{poorest}-{i + 1}": device.data for i, device in enumerate(devices)}
        job = Job(
            model=digits.MODEL,
            data=DataTable("digits"),
            tiers={poorest: FleetTier(clients=len(shares), cut=TIERS[poorest].cut)},
            method="exc",
            rounds=RoundsTable(self.rounds),
            local=LocalTraining(batch_size=BATCH, hyper=HYPER),
            evaluate_every=self.rounds,
            keep_back=KEEP_BACK,
        )
        data = FederatedData(shares, run.setup.held_out, CLASSES)
        with Simulation(job, run.folder / "without-hub", "onnx", data=data) as simulation:
            *_, last = simulation.run()
        return last.accuracy[poorest]["device_alone"]

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Accuracy by tier and path, and without a hub."""
        rows = [
            [
                name,
                str(tier["cut"]),
                *(f"{tier[path]:.1%}" for path in PATHS),
                f"{result['no_hub']:.1%}",
            ]
            for name, tier in result["tiers"].items()
        ]
        header = ["tier", "cut", *PATHS.values(), "without a hub"]
        return [Table("Accuracy on held-out digits", header, rows)]

    def remarks(self, result: Mapping[str, Any]) -> list[str]:
        """What *without a hub* means, and the saved model."""
        return [
            "*Without a hub*: the model that fits the poorest tier, trained by federated "
            "averaging on the same devices for the same rounds.",
            f"The saved model, uncut, in PyTorch: {result['saved_model']:.1%}.",
        ]

    def reference(self, result: Mapping[str, Any]) -> tuple[str, float]:
        """Accuracy without a hub."""
        return "without a hub", result["no_hub"]


def _mean_evaluation(reports: Sequence[Mapping[str, Any]], tier: str) -> dict[str, float]:
    """Accuracy by path, as the devices of a tier have measured it; their mean."""
    own = [report["evaluation"] for report in reports if report["tier"] == tier]
    return {path: float(np.mean([evaluation[path] for evaluation in own])) for path in PATHS}
