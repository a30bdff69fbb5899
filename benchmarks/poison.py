"""Devices that try to spoil the model: accuracy lost to their attacks, on the example fleet.

    python -m benchmarks.poison --json FILE [--attacks flip,claim] [--docs docs]

The job is ``examples/fleet/digits.toml``. Some of its devices attack in every round that they are
drawn for. The loss is the difference from the same seed without attackers, in points: through the
hub, and of the tier that loses most with its devices alone. Every finished run is kept in the JSON
file; a run that is in the file is not repeated. The attacks are in :mod:`benchmarks.attacks`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.attacks import ATTACKS, Attack, behave
from benchmarks.pages import put_between
from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError, CutlayerError
from server_hub.reports.table import Table
from server_hub.simulation.digits import CLASSES
from server_hub.simulation.job import Job
from server_hub.simulation.simulate import Simulation

JOB = Path("examples/fleet/digits.toml")

NONE = "none"
"""Name of the runs without attackers."""

SHARE = 0.2
"""Fraction of the devices in the cells with many attackers."""

MANY = ("scale 10", "scale 100", "claim", "flip", "claim and flip")
"""Attacks that are measured with many attackers, too."""

TARGETS: dict[str, tuple[float, float]] = {"one": (2, 4), "many": (4, 8), "many flip": (3, 8)}
"""Largest loss in points, through the hub and of the worst tier alone."""


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        attack: name of the attack; ``none`` without attackers.
        attackers: number of attacking devices.
        seed: seed of the job.
        hub: accuracy through the hub, the mean over tiers.
        alone: accuracy of the devices alone, by tier.
    """

    attack: str
    attackers: int
    seed: int
    hub: float
    alone: dict[str, float]

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the run."""
        return self.attack, self.attackers, self.seed


def attackers_of(job: Job, count: int) -> list[str]:
    """Return the names of attackers: tier by tier, the deepest first, in turn."""
    tiers = sorted(job.tiers, key=lambda name: -job.tiers[name].cut)
    names = [f"{tiers[i % len(tiers)]}-{i // len(tiers) + 1}" for i in range(count)]
    if any(i // len(tiers) >= job.tiers[tiers[i % len(tiers)]].clients for i in range(count)):
        raise ConfigError(f"the fleet has no {count} devices to attack")
    return names


def run(job: Job, attack: str, attackers: int) -> Result:
    """Run the job with attackers."""
    names = attackers_of(job, attackers)
    change = behave(ATTACKS.get(attack, Attack()), names, CLASSES)
    with (
        tempfile.TemporaryDirectory(prefix="cutlayer-") as folder,
        Simulation(job, Path(folder) / "run", behave=change) as simulation,
    ):
        records = simulation.run()
    accuracy = records[-1].accuracy
    return Result(
        attack,
        attackers,
        job.seed,
        fmean(paths["through_hub"] for paths in accuracy.values()),
        {tier: paths["device_alone"] for tier, paths in accuracy.items()},
    )


def losses(results: Iterable[Result]) -> dict[tuple[str, int], tuple[float, float, int]]:
    """Return what each attack has cost, by name and number of attackers.

    Returns:
        Mean loss in points through the hub, that of the worst tier alone, and the number of seeds.
    """
    found = {result.key: result for result in results}
    cells: dict[tuple[str, int], list[tuple[Result, Result]]] = {}
    for (attack, attackers, seed), result in found.items():
        base = found.get((NONE, 0, seed))
        if attackers and base is not None:
            cells.setdefault((attack, attackers), []).append((base, result))
    lost = {}
    for cell, pairs in cells.items():
        hub = 100 * fmean(base.hub - result.hub for base, result in pairs)
        tiers = pairs[0][0].alone
        alone = max(
            100 * fmean(base.alone[t] - result.alone[t] for base, result in pairs) for t in tiers
        )
        lost[cell] = hub, alone, len(pairs)
    return lost


def table(results: Sequence[Result]) -> Table:
    """Return the table of the losses beside their targets."""
    rows = []
    for (attack, attackers), (hub, alone, seeds) in losses(results).items():
        kind = "one" if attackers == 1 else "many flip" if attack == "flip" else "many"
        most_hub, most_alone = TARGETS[kind]
        met = hub <= most_hub and alone <= most_alone
        rows.append(
            [attack, str(attackers), f"{hub:.1f}", f"{alone:.1f}", f"{most_hub:g} / {most_alone:g}",
             "yes" if met else "**no**", str(seeds)]
        )  # fmt: skip
    return Table(
        "points lost to attackers",
        ["attack", "attackers", "through the hub", "worst tier alone", "target", "met", "seeds"],
        rows,
    )


def read(path: Path) -> list[Result]:
    """Return the results in a JSON file; none if there is no file."""
    if not path.exists():
        return []
    return [Result(**row) for row in json.loads(path.read_text("utf-8"))]


def main(
    json_file: Annotated[Path, typer.Option("--json", help="JSON file of the results.")],
    job_file: Annotated[Path, typer.Option("--job", help="Job to simulate.")] = JOB,
    attacks: Annotated[str, typer.Option(help="Attacks, separated by commas.")] = ",".join(ATTACKS),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    many: Annotated[bool, typer.Option(help="Also run with 20 % attackers.")] = True,
    docs: Annotated[
        Path | None, typer.Option(help="Folder of results.md; the table goes there.")
    ] = None,
) -> None:
    """Run the benchmark, or what is left of it."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    job = Job.read(job_file)
    job = replace(job, evaluate_every=job.rounds.count)  # only the last model counts
    chosen = [name.strip() for name in attacks.split(",")]
    for name in chosen:
        if name not in ATTACKS:
            raise ConfigError(f"there is no attack {name!r}; there are {', '.join(ATTACKS)}")
    cells = [(NONE, 0), *((name, 1) for name in chosen)]
    if many:
        cells += [(name, round(SHARE * job.clients)) for name in chosen if name in MANY]
    results = read(json_file)
    done = {result.key for result in results}
    for seed in range(seeds):
        for attack, attackers in cells:
            if (attack, attackers, seed) in done:
                continue
            results.append(run(replace(job, seed=seed), attack, attackers))
            rows = json.dumps([asdict(result) for result in results], indent=1)
            write_atomically(json_file.absolute(), f"{rows}\n".encode())
            console.print(results[-1])
    console.print(table(results).rich())
    if docs is not None:
        put_between(docs / "results.md", "poison", table(results).markdown(level=3))


if __name__ == "__main__":
    try:
        typer.run(main)
    except CutlayerError as error:
        raise SystemExit(f"benchmarks.poison: {error}") from error
