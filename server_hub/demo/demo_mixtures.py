"""The demo with mixtures: Split-Mix over six devices, then one device that mixes base networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from edge_sdk.inference.metrics import Metric
from edge_sdk.training.adversarial import Attack
from export.bases.exported import whole_bases
from export.bases.split_width import split_width
from export.bundles.model_source import draw_inputs
from export.bundles.writer import Tier
from server_hub.demo import digits
from server_hub.demo.mix_model import BASES, MODEL, build
from server_hub.demo.processes import check_device, check_no_torch, json_lines
from server_hub.demo.runner import DemoDevice, DemoRun, Setup
from server_hub.reports.progress import live_view
from server_hub.reports.table import Table
from server_hub.reports.values import bases as bases_name
from server_hub.simulation.digits import CLASSES, load
from server_hub.trunk.adversarial import hard_examples

DEVICE = "server_hub.demo.device_mixing"
ATTACK = Attack(epsilon=0.1, step_size=0.025, steps=7)
"""Pixels are from 0 to 1."""

MIXED = (1, 2, 4, 8)
ROBUSTNESS = (0.0, 0.5, 1.0)
BATCH = 16
BUDGETS = {"small": 1 / 8, "medium": 1 / 4, "large": 1 / 2}
"""Part of the wide model that a device of a tier trains in a round."""

ADVERSARIAL = ("medium", "large")
"""Tiers whose devices also train on adversarial examples."""

DEVICES_PER_TIER = 2


@dataclass(frozen=True)
class MixtureDemo:
    """Split-Mix on handwritten digits.

    Attributes:
        rounds: rounds of federated training.
        lr: learning rate of the devices.
        mixed: the numbers of bases that the device mixes, one after the other.
    """

    rounds: int = 40
    lr: float = 0.1
    mixed: Sequence[int] = MIXED
    title: ClassVar[str] = "Split-Mix over six devices of three tiers, on digits"
    metric: ClassVar[Metric] = "accuracy"

    def prepare(self, run: DemoRun) -> Setup:
        """Deal the digits out, and split the wide model into base networks."""
        train, held_out = load()
        names = [f"{tier}-{i + 1}" for tier in BUDGETS for i in range(DEVICES_PER_TIER)]
        run.step(f"data: {len(train)} digits on {len(names)} devices, {len(held_out)} held out")
        shape = train.x.shape[1:]
        model, example = build(), torch.from_numpy(train.x[:64])
        bases = split_width(model, BASES, draw_inputs(shape, None)).with_dual_norms()
        found = whole_bases(bases, [], example, CLASSES)
        wide = sum(p.numel() for p in model.parameters())
        base = sum(p.numel() for p in bases.model.parameters())
        run.say(
            f"a model of {wide:,} parameters, split by width into {BASES} bases of {base:,}\n"
            f"   with dual norms: {BASES * base / wide:.1%} of the model in all"
        )
        like = {"bases": BASES, "dual_norms": True, "shape": list(shape), "high": None}
        shares = digits.partition(train, len(names), 1.0)
        return Setup(
            model=found.hub,
            example=train.x[:64],
            held_out=held_out,
            devices=[
                DemoDevice(name, name.partition("-")[0], share, ("--json",))
                for name, share in zip(names, shares, strict=True)
            ],
            tiers={
                name: Tier(
                    model.depth,
                    batch=BATCH,
                    bases=BASES,
                    graphs=["adversarial_train"] if name in ADVERSARIAL else [],
                )
                for name in BUDGETS
            },
            export={
                "classes": CLASSES,
                "model_path": MODEL,
                "extra": {"mix": like},
                "bases": found,
            },
            hub={
                "keep_serving": True,
                "method": {"name": "splitmix"},
                "local": {"batch_size": BATCH, "hyper": {"lr": self.lr, "momentum": 0.9}},
                "mix": {"robustness": 0.5, "attack": asdict(ATTACK), "budgets": BUDGETS},
            },
        )

    def measure(self, run: DemoRun) -> dict[str, Any]:
        """Clean and attacked accuracy, time and memory of each mixture on one device."""
        run.step("adversarial examples against each mixture, by an attacker who knows it")
        with run.console.status(""):
            self._attack(run)
        run.step("one device mixes; it downloads base networks and nothing else")
        rows, choices = self._mix(run)
        for name, choice in choices.items():
            run.say(
                f"{name}: [bold]{bases_name(choice['bases'])}[/], robustness "
                f"[bold]{choice['robustness']:g}[/]. {choice['reason']}"
            )
        return {"rows": rows, "choices": choices}

    def _attack(self, run: DemoRun) -> None:
        """Write the held-out examples, clean and attacked for each mixture."""
        order, held_out = run.records[-1].order, run.setup.held_out
        models = [run.trained_model(f"model.base-{base}.safetensors") for base in order]
        x, y = torch.from_numpy(held_out.x), torch.from_numpy(held_out.y)
        attacked: dict[str, Any] = {
            f"{n}/{robustness:g}": hard_examples(models[:n], x, y, ATTACK, robustness).numpy()
            for n in self.mixed
            for robustness in ROBUSTNESS
        }
        np.savez(run.inputs / "attacked.npz", **attacked, x=held_out.x, y=held_out.y)

    def _mix(self, run: DemoRun) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Let a further device answer with each mixture; its rows, and a policy's choices."""
        name = "guest"
        process = run.start(
            name, DEVICE, "--url", run.hub.address, "--cache", str(run.folder / "cache" / name),
            "--attacked", str(run.inputs / "attacked.npz"),
            "--bases", *map(str, self.mixed), "--robustness", *(f"{r:g}" for r in ROBUSTNESS),
            token=run.tokens.issue(name, "large"),
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        last: dict[str, Any] = {}
        with live_view(run.console) as show:
            for last in json_lines(process):
                if "bases" in last:
                    rows.append(last)
                    show(mixtures_table(rows).rich())
        check_device(process, name, run.folder)
        check_no_torch(last, name)
        return rows, last["choices"]

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """The mixtures of one device."""
        return [mixtures_table(result["rows"])]

    def remarks(self, result: Mapping[str, Any]) -> list[str]:
        """How examples were attacked, and what a policy chooses."""
        choices = [
            f"- {name}: {bases_name(c['bases'])}, robustness {c['robustness']:g}. {c['reason']}"
            for name, c in result["choices"].items()
        ]
        return [
            f"*Attacked*: adversarial examples, each pixel at most {ATTACK.epsilon:g} away from "
            "its value, from 0 to 1; by projected gradient ascent against the mixture itself.",
            "## What a policy chooses\n\n" + "\n".join(choices),
        ]

    def reference(self, result: Mapping[str, Any]) -> None:
        """No line in the curves."""
        return


def mixtures_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy, time and memory of each mixture on one device."""
    header = ["bases", "λ", "clean", "attacked", "ms", "process, MB"]
    cells = [
        [
            str(row["bases"]),
            f"{row['lambda']:g}",
            f"{row['clean_accuracy']:.1%}",
            f"{row['robust_accuracy']:.1%}",
            f"{row['latency_ms']:.2f}",
            f"{row['rss_mb']:.1f}",
        ]
        for row in rows
    ]
    return Table("One device, mixing: accuracy on held-out digits", header, cells, 0)
