"""Split-Mix against FedAvg and HeteroFL: width and robustness chosen at inference time.

    python -m benchmarks.splitmix --cifar PATH [--work runs/splitmix] [--jobs 2] [--finished]
        [--json FILE] [--docs FOLDER]

Twenty simulated devices have budgets of 1/8, 1/4, 1/2 and 1 of a model. Split-Mix trains eight base
networks on all devices. HeteroFL trains nested widths. FedAvg trains a model for each width, on the
devices whose budget allows it. On digits, Split-Mix and FedAvg are also trained for robustness
against adversarial examples. The plan is ``splitmix.toml`` beside this file. Finished runs in the
work folder are not repeated; an interrupted run resumes. ``--docs docs`` also writes tables,
verdicts and pictures into ``docs/results.md``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import splitmix_report as report
from benchmarks.cells import run_cells
from benchmarks.pages import put_between
from benchmarks.splitmix_runs import (
    ADVERSARIAL,
    DUAL,
    FEDAVG,
    HETEROFL,
    PLAIN,
    ROBUST_NAMES,
    SPLITMIX,
    UNMASKED,
    WIDTHS,
    Run,
    Runs,
    Setting,
    panels,
)
from edge_sdk import config
from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError, CutlayerError
from edge_sdk.training.adversarial import Attack
from export.bundles.model_source import build_model
from export.cutting.split_model import SplitModel
from server_hub.reports.files import write_rows
from server_hub.simulation.job import Job, SplitMixTable
from server_hub.simulation.partition import PartitionTable
from server_hub.simulation.simulate import Simulation
from server_hub.simulation.workers import Cell
from server_hub.storage.run_folder import read_records
from server_hub.trunk.adversarial import hard_examples, mixed_logits

PLAN = Path(__file__).with_name("splitmix.toml")
PICTURE, ROBUST_PICTURE = "splitmix.png", "splitmix-robust.png"

NON_IID = "3 classes"
PARTITIONS = {
    "iid": PartitionTable("iid"),
    NON_IID: PartitionTable("shards", classes_per_client=3),
}
METHODS = {SPLITMIX: "splitmix", UNMASKED: "splitmix", FEDAVG: "fedavg", HETEROFL: "heterofl"}
"""Methods of jobs, by name in the tables. The runs for robustness all use Split-Mix; with one base
and without dual norms, Split-Mix is FedAvg."""

ROBUST = "robust.json"
"""Name of the file in a run folder with the accuracy on clean and adversarial examples."""
ROBUSTNESS = (0.0, 0.2, 0.5, 0.8, 1.0)
MIXED = (1, 4, 8)
ATTACK_STEPS = 20
"""Number of steps of the attack at measurement; the attack during training takes fewer."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The settings that the runs on some data share.

    Attributes:
        rounds: number of rounds, for all methods.
        rates: learning rate by method. A FedAvg model with a rate of its own has the key
            ``fedavg WIDTH``.
        every: number of rounds from one measurement to the next.
        train: maximum number of training examples.
        test: maximum number of held-out examples.
        batch_size: rows of a local step.
        mix: the base networks.
    """

    rounds: int
    rates: dict[str, float]
    every: int = 1
    train: int | None = None
    test: int | None = None
    batch_size: int = 32
    mix: SplitMixTable = field(default_factory=SplitMixTable)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The contents of ``splitmix.toml``.

    Attributes:
        job: the job that all runs share.
        fleets: settings of the runs by data.
        robust: settings of the runs for robustness.
    """

    job: Job
    fleets: dict[str, Part]
    robust: Part

    def cell(self, setting: Setting, seed: int, work: Path, cifar: Path) -> Cell:
        """Return the cell of a setting with a seed."""
        robust = setting.method in ROBUST_NAMES
        part = self.robust if robust else self.fleets[setting.data]
        method = "splitmix" if robust else METHODS[setting.method]
        data = replace(
            self.job.data,
            source="digits" if setting.data == "digits" else str(cifar.absolute()),
            train=part.train,
            test=part.test,
            scale="unit" if robust else "standard",
        )
        rates = part.rates
        rate = rates[setting.method if robust else method]
        hyper = {**self.job.local.hyper, "lr": rates.get(f"{method} {setting.width}", rate)}
        depth = build_model(setting.model).depth
        tiers = {name: replace(tier, cut=depth) for name, tier in self.job.tiers.items()}
        mix = replace(part.mix, masked=setting.method != UNMASKED)
        if setting.method in (ADVERSARIAL, PLAIN):  # one base is federated averaging
            tiers = {name: replace(tier, budget=1.0) for name, tier in tiers.items()}
            mix = replace(mix, bases=1, dual_norms=False)
        if setting.method == PLAIN:
            mix = replace(mix, robustness=0.0)
        name = f"{setting.data}-{setting.partition}-{setting.method}-{setting.width}"
        return Cell(
            replace(
                self.job,
                model=setting.model,
                method=method,
                data=data,
                partition=PARTITIONS[setting.partition],
                rounds=replace(self.job.rounds, count=part.rounds),
                local=replace(self.job.local, batch_size=part.batch_size, hyper=hyper),
                tiers=tiers,
                mix=mix,
                evaluate_every=part.every,
                seed=seed,
            ),
            work / name.replace("/", "-").replace(" ", "-").lower() / f"seed-{seed}",
        )


def settings_of(data: str) -> list[Setting]:
    """Return the settings on one data set, the longest runs first."""
    widths = {SPLITMIX: ["1"], UNMASKED: ["1"], HETEROFL: ["1"], FEDAVG: list(WIDTHS)}
    return [
        Setting(data, partition, method, width)
        for partition in PARTITIONS
        for method, trained in widths.items()
        for width in trained
        if method != UNMASKED or partition == NON_IID
    ]


SETTINGS = [
    *settings_of("digits"),
    *(Setting("digits", "iid", method) for method in ROBUST_NAMES),
    *settings_of("cifar10"),
]


def main(
    cifar: Annotated[Path, typer.Option(help="CIFAR-10: a folder, or an .npz file of images.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/splitmix"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, with one thread each.")] = 2,
    finished: Annotated[
        bool, typer.Option("--finished", help="Run nothing; show the finished runs.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Folder of results.md; tables and pictures go there.")
    ] = None,
) -> None:
    """Run the benchmark, or the rest of an interrupted one."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    if not finished and not cifar.exists():
        raise ConfigError(f"{cifar} does not exist; give the folder of CIFAR-10, or an .npz file")
    plan = config.load(Plan, PLAN)
    cells = {(s, n): plan.cell(s, n, work, cifar) for n in range(seeds) for s in SETTINGS}
    if not finished:
        todo = {key: cell for key, cell in cells.items() if not done(*key, cell)}
        runs_left = [partial(run_cell, setting, cell) for (setting, _), cell in todo.items()]
        run_cells(console, list(todo.values()), runs_left, jobs)
    runs: Runs = {
        (setting, seed): read_run(setting, cell)
        for (setting, seed), cell in cells.items()
        if done(setting, seed, cell)
    }
    if not runs:
        raise ConfigError("no run is finished; run without --finished")
    attack = plan.robust.mix.attack
    how = f"an attack of {ATTACK_STEPS} steps within {attack.epsilon:g} ({seeds_of(runs)} seeds)"
    tables = [report.panel_table(panel) for panel in panels(runs)]
    tables.append(report.robust_table(runs, how))
    for table in tables:
        console.print(table.rich())
    verdicts = list(report.verdicts(runs))
    for verdict in verdicts:
        console.print(verdict)
    if json_file is not None:
        write_rows(json_file, [run.row() for run in runs.values()])
    if docs is not None:
        report.draw(runs, docs / PICTURE)
        report.draw_robust(runs, docs / ROBUST_PICTURE)
        parts = [
            setting_text(plan), *(table.markdown(3) for table in tables),
            "\n".join(f"- {verdict}" for verdict in verdicts),
            f"![accuracy over operations per answer]({PICTURE})",
            f"![robust over clean accuracy]({ROBUST_PICTURE})",
        ]  # fmt: skip
        put_between(docs / "results.md", "splitmix", "\n\n".join(parts))


# --- running --------------------------------------------------------------------------------------


def done(setting: Setting, seed: int, cell: Cell) -> bool:
    """Return whether a cell is finished; a run for robustness needs its measurement too."""
    measured = setting.method not in ROBUST_NAMES or (cell.folder / ROBUST).exists()
    return cell.finished("torch") and measured


def read_run(setting: Setting, cell: Cell) -> Run:
    """Read a finished cell."""
    robust = cell.folder / ROBUST
    found = json.loads(robust.read_text("utf-8")) if robust.exists() else ()
    return Run(setting, cell.job, read_records(cell.folder), found)


def run_cell(setting: Setting, cell: Cell) -> None:
    """Run a cell, or the rest of it; with FedAvg, on the devices whose budget allows the model."""
    with Simulation(cell.job, cell.folder) as simulation:
        if setting.method == FEDAVG:
            simulation.clients = [
                client for client in simulation.clients
                if cell.job.tiers[client.tier].budget >= WIDTHS[setting.width]
            ]  # fmt: skip
        simulation.run()
        if setting.method not in ROBUST_NAMES:
            return
        held_out = simulation.data.held_out
        rows = [row for row in range(len(held_out)) if row % 5]  # the others rank the bases
        x = torch.from_numpy(held_out.x[rows])
        y = torch.from_numpy(held_out.y[rows])
        models = trained_bases(simulation.fleet.model, cell)
        dual = setting.method == DUAL
        found = measure_robustness(
            models,
            x,
            y,
            cell.job.mix.attack,
            MIXED if dual else (1,),
            ROBUSTNESS if dual else (0.0,),
        )
    write_atomically((cell.folder / ROBUST).absolute(), json.dumps(found).encode())


# --- robustness -----------------------------------------------------------------------------------


def trained_bases(structure: SplitModel, cell: Cell) -> list[SplitModel]:
    """Return the bases of a finished run, best first."""
    models = []
    for base in read_records(cell.folder)[-1].order:
        model = copy.deepcopy(structure).eval().requires_grad_(False)
        model.load_state_dict(load_file(cell.folder / f"model.base-{base}.safetensors"))
        models.append(model)
    return models


def measure_robustness(
    models: Sequence[SplitModel],
    x: Tensor,
    y: Tensor,
    attack: Attack,
    mixed: Sequence[int],
    wanted: Sequence[float],
) -> list[dict[str, float]]:
    """Measure clean and robust accuracy of mixtures of the first models.

    The attack knows the mixture: its gradients are those of the mixture with the robustness of the
    answer.

    Returns:
        Rows with ``bases`` (number of models), ``robustness``, and the accuracies ``clean`` and
        ``robust``.
    """
    found = []
    attack = replace(attack, steps=ATTACK_STEPS)
    for bases in mixed:
        for value in wanted:
            chosen = models[:bases]
            attacked = hard_examples(chosen, x, y, attack, value)
            with torch.no_grad():
                clean, robust = (
                    float((mixed_logits(chosen, inputs, value).argmax(1) == y).float().mean())
                    for inputs in (x, attacked)
                )
            found.append({"bases": bases, "robustness": value, "clean": clean, "robust": robust})
    return found


# --- the page -------------------------------------------------------------------------------------


def seeds_of(runs: Runs) -> int:
    """Return the number of seeds of the runs for robustness."""
    return len({seed for setting, seed in runs if setting.method in ROBUST_NAMES})


def setting_text(plan: Plan) -> str:
    """Return the settings of all runs, in Markdown."""
    tiers = ", ".join(f"{tier.budget:g}" for tier in plan.job.tiers.values())
    fleets = "; ".join(
        f"{name}: {part.rounds} rounds, "
        + (f"{part.train:,} images" if part.train else "all images")
        + f", batches of {part.batch_size}, rates "
        + ", ".join(f"{rate:g} ({method})" for method, rate in part.rates.items())
        for name, part in plan.fleets.items()
    )
    robust = plan.robust
    mix, rates = robust.mix, ", ".join(f"{r:g} ({m})" for m, r in robust.rates.items())
    return (
        f"{plan.job.clients} devices, as many with each budget of {tiers}; all take part in every "
        f"round of one local epoch; SGD with momentum and a cosine schedule. {fleets}. Rates were "
        "chosen on another seed. Whole bases are on the devices. A seed changes the partition, "
        "the order of batches, and the initial weights of bases.\n\n"
        "*Width* is a fraction of the channels. For Split-Mix it is n/8: a mixture of n of 8 "
        "bases, which has about n/64 of the weights. FedAvg trains a model for each width, on the "
        "devices whose budget allows it. *Accuracy* is measured on held-out examples after the "
        "last round; a fifth of the examples ranks the bases of Split-Mix, which are measured on "
        "the rest. *Equal FLOPs* is the accuracy when all devices together have spent as many "
        "operations as in the whole job of Split-Mix. It is interpolated between two measured "
        "rounds, in which the learning rate has not decayed to its end. A star marks runs that end "
        "before; the figure is their final accuracy. HeteroFL's devices are charged the mean of "
        "the widths that they draw. Training costs are those of all devices (FLOPs) and per device "
        "of the fleet (traffic). Split-Mix and HeteroFL train all widths for the cost in their "
        "first line. The loss of Split-Mix leaves out the logits of classes that a device has no "
        "examples of, as in its paper, unless it is *unmasked*; the losses of FedAvg and HeteroFL "
        "are over all classes.\n\n"
        f"For robustness: digits, IID, {robust.rounds} rounds, adversarial examples of "
        f"{mix.attack.steps} steps of {mix.attack.step_size:g} within {mix.attack.epsilon:g} and "
        f"weight {mix.robustness:g}, rates {rates}. FedAvg is one base with all channels, on "
        "devices whose budgets all allow it. The attack at measurement knows the mixture and the "
        f"robustness of the answer, and takes {ATTACK_STEPS} steps."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CutlayerError as error:
        raise SystemExit(f"benchmarks.splitmix: {error}") from error
