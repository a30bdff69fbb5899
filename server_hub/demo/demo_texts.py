"""The demo with texts: SplitFT over devices whose cuts move, and all texts in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text

from edge_sdk.inference.metrics import Metric
from export.adapters_lora.lora import Lora
from export.bundles.model_source import build_model
from export.bundles.writer import Tier
from export.steps.optimizers import check_hyper
from server_hub.demo import texts
from server_hub.demo.runner import DemoDevice, DemoRun, Setup, check_saved_model
from server_hub.demo.texts import TOPICS, Pretraining, Shape, Texts
from server_hub.reports.progress import progress_bar
from server_hub.reports.table import Table
from server_hub.simulation.datasets import BYTES

CUT_RANK = 8
LORA = Lora(rank=16, alpha=32, targets=["c_attn", "c_proj", "c_fc"])
CUTS = {"phone": 1, "tablet": 2, "laptop": 4}
"""Cut of each tier at first; a device may move to any of the others."""

FLEET = {
    "phone-1": ("phone", 16),
    "phone-2": ("phone", 6),
    "tablet-1": ("tablet", 7),
    "tablet-2": ("tablet", 16),
    "laptop-1": ("laptop", 3),
    "laptop-2": ("laptop", 7),
}
"""Tier of each device, and how many times slower it is than a core of this machine.

In each tier one of the two devices does not match its tier's cut: that is what moves cuts.
"""

BATCH = 8
MERGED_ROWS = 16
DEVICE = "server_hub.demo.device_slow"
PROMPT = "Return a copy of the "


@dataclass(frozen=True)
class TextDemo:
    """SplitFT on CPython's manual.

    Attributes:
        shape: of the model.
        pretraining: of the base.
        rounds: rounds of fine-tuning.
        texts: texts of each device at most.
        held_out: texts of each topic to measure on, at most.
        lr: learning rate of devices and trunk.
        lr_centralized: learning rate of fine-tuning in one place.
        cuts: cut by tier.
        fleet: tier and slowness of each device; the first of them writes at the end.
    """

    shape: Shape = field(default_factory=Shape)
    pretraining: Pretraining = field(default_factory=Pretraining)
    rounds: int = 16
    texts: int = 96
    held_out: int = 24
    lr: float = 3e-3
    lr_centralized: float = 3e-3
    cuts: Mapping[str, int] = field(default_factory=lambda: CUTS)
    fleet: Mapping[str, tuple[str, float]] = field(default_factory=lambda: FLEET)
    title: ClassVar[str] = "SplitFT over devices of unequal speed, on CPython's manual"
    metric: ClassVar[Metric] = "perplexity"

    def prepare(self, run: DemoRun) -> Setup:
        """Load the manual, pretrain the base, and measure it."""
        data = texts.load(TOPICS[: len(self.fleet)], self.shape.context, self.texts, self.held_out)
        run.step(
            f"data: CPython's manual; {len(data.pretraining) / 1e3:.0f} kB on the language to "
            f"pretrain on,\n   and {len(data.shares)} topics on the library, one on each device: "
            f"{sum(map(len, data.shares.values()))} texts of up to {self.shape.context} bytes, "
            f"{len(data.held_out)} more held out"
        )
        base = run.folder / "base"
        self._pretrain(base, data, run)
        model = build_model(str(base), LORA)
        before = texts.perplexity(model, data.held_out)
        run.say(f"perplexity of a byte, on the held-out texts: [bold]{before:.2f}[/]")
        run.say(
            "devices emulate their speed by sleeping; times slower than a core of this machine:"
        )
        run.say(", ".join(f"{name} {slower:g}" for name, (_, slower) in self.fleet.items()))
        optimizer = {"hyper": {"lr": self.lr}}
        return Setup(
            model=model,
            example=data.held_out.x[:BATCH],
            held_out=data.held_out,
            devices=self._devices(data),
            tiers={
                name: Tier(cut=cut, graphs=["backward"], cut_rank=CUT_RANK)
                for name, cut in self.cuts.items()
            },
            export={
                "classes": BYTES,
                "optimizer": "adamw",
                "model_path": str(base),
                "extra": {"lora": asdict(LORA)},
            },
            hub={
                "method": {"name": "splitft", "cut_rank": CUT_RANK},
                "local": {"batch_size": BATCH, "staleness": 1, **optimizer},
                "cuts": {"policy": "latency"},
                "trunk": {"optimizer": "adamw", "max_rows": MERGED_ROWS, "threads": 1, **optimizer},
            },
            found={"ppl_before": before},
        )

    def _devices(self, data: Texts) -> list[DemoDevice]:
        writing = ("--prompt", PROMPT, "--context", str(self.shape.context))
        return [
            DemoDevice(
                name,
                tier,
                share,
                ("--slower", str(slower), *(writing if number == 0 else ())),
                DEVICE,
            )
            for number, ((name, (tier, slower)), share) in enumerate(
                zip(self.fleet.items(), data.shares.values(), strict=True)
            )
        ]

    def _pretrain(self, folder: Path, data: Texts, run: DemoRun) -> None:
        shape, plan = self.shape, self.pretraining
        run.step(f"pretrain a GPT-2 of {shape.blocks} blocks, width {shape.width}, in one place")
        with progress_bar(run.console, "   steps") as bar:
            task = bar.add_task("", total=plan.steps)
            texts.pretrain(
                folder,
                shape,
                data.pretraining,
                plan,
                progress=lambda step, loss: bar.update(
                    task, completed=step, description=f"loss {loss:.3f}"
                ),
            )

    def measure(self, run: DemoRun) -> dict[str, Any]:
        """Perplexity of the saved model, and of the same adapters trained in one place."""
        held_out, records = run.setup.held_out, run.records
        after = texts.perplexity(run.trained_model(), held_out)
        through_hub = {tier: paths["through_hub"] for tier, paths in records[-1].accuracy.items()}
        check_saved_model(after, through_hub, self.metric)
        run.step("for comparison: the same adapters, trained on all texts in one place")
        whole = build_model(str(run.folder / "base"), LORA)
        with run.console.status("training") as status:
            texts.fine_tune(
                whole,
                texts.pooled([device.data for device in run.setup.devices]),
                self.rounds,
                BATCH,
                check_hyper("adamw", {"lr": self.lr_centralized}),
                progress=lambda epoch: status.update(f"epoch {epoch} of {self.rounds}"),
            )
        writer = run.reports[0]
        run.say(f"{writer['name']} and the hub together continue {PROMPT!r}:")
        run.console.print(Text("   " + " ".join(writer["written"].split()), style="italic"))
        return {
            "ppl_after": after,
            "ppl_centralized": texts.perplexity(whole, held_out),
            "through_hub": through_hub,
            "cuts": [record.cuts for record in records],
            "moves": [{"round": r.round, **move} for r in records for move in r.moves],
            "writer": writer["name"],
            "written": writer["written"],
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Perplexity before, after, and of training in one place."""
        tuned = [f"{value:.2f}" for value in result["through_hub"].values()]
        none = ["" for _ in tuned]
        rows = [
            ["as pretrained", f"{result['ppl_before']:.2f}", *none],
            ["SplitFT over the devices", f"{result['ppl_after']:.2f}", *tuned],
            ["all texts in one place", f"{result['ppl_centralized']:.2f}", *none],
        ]
        header = ["model", "uncut", *(f"{tier}, through hub" for tier in result["through_hub"])]
        return [Table("Perplexity of a byte on held-out texts", header, rows)]

    def remarks(self, result: Mapping[str, Any]) -> list[str]:
        """What *all texts in one place* means, and the text that a device has written."""
        return [
            "*All texts in one place*: the same adapters at full rank, trained by eager PyTorch on "
            "as many samples; no device could do that.",
            f"{result['writer']} and the hub together continue a text:\n\n"
            f"```\n{result['written']}\n```",
        ]

    def reference(self, result: Mapping[str, Any]) -> tuple[str, float]:
        """Perplexity of training in one place."""
        return "all texts in one place", result["ppl_centralized"]
