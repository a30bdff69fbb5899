"""SplitFT: adaptive cuts against fixed cuts, on five unequal simulated devices.

    python -m benchmarks.splitft --pretrain FILE --train FILE --test FILE
        [--work runs/splitft] [--jobs 2] [--json FILE] [--docs FOLDER]

A small GPT-2 for bytes is trained once on a text (``--pretrain``) and kept in the work folder. It
is adapted to another text (``--train``) with LoRA; its perplexity is measured on a third text
(``--test``). The job is ``splitft.toml`` beside this file. The work folder is for one set of texts.
Finished runs in it are not repeated; an interrupted run resumes. ``--docs docs`` also writes
tables, verdicts and a picture into ``docs/results.md``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import gpt2
from benchmarks.cells import run_cells
from benchmarks.pages import put_between
from benchmarks.splitft_report import (
    CENTRALIZED_RATE,
    HELD_OUT,
    MORE_ROUNDS,
    SETTINGS,
    Run,
    centralized_verdict,
    costs_table,
    draw,
    perplexity_table,
    time_verdict,
)
from edge_sdk.errors import ConfigError, CutlayerError
from edge_sdk.inference.metrics import Tally
from edge_sdk.training.data import Examples
from server_hub.reports.files import write_rows
from server_hub.simulation.datasets import DataTable, load_dataset
from server_hub.simulation.job import Job
from server_hub.simulation.simulate import Simulation
from server_hub.simulation.workers import Cell
from server_hub.storage.run_folder import read_records
from server_hub.trunk.evaluator import batches_to_evaluate

JOB = Path(__file__).with_name("splitft.toml")
PICTURE = "splitft.png"


def main(
    pretrain: Annotated[Path, typer.Option(help="Text that the base model is trained on.")],
    train: Annotated[Path, typer.Option(help="Text that the fleet adapts it to.")],
    test: Annotated[Path, typer.Option(help="Text that perplexity is measured on.")],
    work: Annotated[Path, typer.Option(help="Folder of model and runs.")] = Path("runs/splitft"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, with one thread each.")] = 2,
    finished: Annotated[
        bool, typer.Option("--finished", help="Run nothing; show the finished runs.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the rows to.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Folder of results.md; tables and a picture go there.")
    ] = None,
) -> None:
    """Run the benchmark, or the rest of an interrupted one."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    job = Job.read(JOB)
    job = replace(job, data=replace(job.data, source=str(train.absolute())))
    base = work.absolute() / "base"
    if not base.exists():
        if finished:
            raise ConfigError(f"{work} has no base model; run without --finished first")
        with console.status("training the base model"):
            gpt2.pretrain(pretrain, base)
    os.environ[gpt2.BASE] = str(base)  # child processes read it too
    texts = DataTable(str(test), held_out=job.data.held_out, train=HELD_OUT, length=gpt2.LENGTH)
    held_out = load_dataset(texts).train
    cells = {(s, seed): s.cell(job, seed, work) for seed in range(seeds) for s in SETTINGS}
    if not finished:
        todo = [cell for cell in cells.values() if not cell.finished("torch")]
        runs_left = [partial(run_cell, cell, held_out) for cell in todo]
        run_cells(console, list(cells.values()), runs_left, jobs)
    runs = {
        (setting, seed): Run(setting, cell.job, job.rounds.count, read_records(cell.folder))
        for (setting, seed), cell in cells.items()
        if cell.finished("torch")
    }
    if not runs:
        raise ConfigError("no run is finished; run without --finished")
    before = perplexity_before(held_out)
    tables = [perplexity_table(runs), costs_table(runs)]
    for table in tables:
        console.print(table.rich())
    verdicts = [time_verdict(runs), centralized_verdict(runs)]
    for verdict in verdicts:
        console.print(verdict)
    if json_file is not None:
        write_rows(json_file, [run.row(before) for run in runs.values()])
    if docs is not None:
        draw(runs, docs / PICTURE)
        picture = f"![perplexity over simulated time]({PICTURE})"
        parts = [
            setting_text(job, before, seeds),
            *(table.markdown(3) for table in tables),
            "\n".join(f"- {verdict}" for verdict in verdicts),
            picture,
        ]
        put_between(docs / "results.md", "splitft", "\n\n".join(parts))


# --- running --------------------------------------------------------------------------------------


def run_cell(cell: Cell, held_out: Examples) -> None:
    """Run a cell, or the rest of it; perplexity is measured on ``held_out``."""
    with Simulation(cell.job, cell.folder) as simulation:
        simulation.data = replace(simulation.data, held_out=held_out)
        simulation.run()


@torch.no_grad()
def perplexity_before(held_out: Examples) -> float:
    """Return the perplexity of the base model, uncut, before any training of adapters."""
    model, tally = gpt2.build().eval(), Tally("tokens")
    for batch in batches_to_evaluate(held_out, model):
        logits = model(torch.from_numpy(batch.x)).double()
        tally.add(logits[None].numpy(), batch.y)
    return tally.value


# --- the page -------------------------------------------------------------------------------------


def setting_text(job: Job, before: float, seeds: int) -> str:
    """Return the settings that all runs share, in Markdown."""
    tiers = "; ".join(
        f"{t.clients} {name} ({t.gflops:g} GFLOPS, {t.uplink_mbit:g} Mbit/s up, "
        f"{t.latency_ms:g} ms)"
        for name, t in job.tiers.items()
    )
    return (
        f"{job.clients} devices: {tiers}; a hub of {job.hub_gflops:g} GFLOPS. {job.data.train} "
        f"texts of up to {job.data.length} bytes, each once in a round, {job.rounds.count} "
        f"rounds, batches of {job.local.batch_size}, merged in the trunk up to "
        f"{job.trunk.max_rows} texts per step, staleness {job.local.staleness}. AdamW with a "
        f"constant rate: {job.local.hyper['lr']:g} on devices, {job.trunk.hyper['lr']:g} in the "
        f"trunk, {CENTRALIZED_RATE:g} for centralized training, tuned on another seed. GPT-2 with "
        f"{gpt2.DEPTH} blocks, {gpt2.WIDTH} wide, LoRA rank {gpt2.RANK}. Perplexity of a byte on "
        f"{HELD_OUT} held-out texts, {before:.2f} before training; {seeds} seeds. Adaptive runs "
        f"last {MORE_ROUNDS:g} times as many rounds; the additional rounds count only in the time "
        "to the fixed cut's perplexity and in the picture. Times are virtual."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except CutlayerError as error:
        raise SystemExit(f"benchmarks.splitft: {error}") from error
