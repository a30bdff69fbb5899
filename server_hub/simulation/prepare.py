"""Before a simulation runs: who holds what, whether model and data fit, what a folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Array
from export.split import SplitModel
from export.writer import Tier
from server_hub.methods.fleet import Fleet
from server_hub.methods.registry import find, simulated_methods
from server_hub.simulation.checkpoint import Checkpoint
from server_hub.simulation.datasets import Dataset, load_dataset
from server_hub.simulation.job import DeviceRuntime, FleetTier, Job
from server_hub.simulation.partition import partition
from server_hub.storage.run_folder import METRICS, read_records
from server_hub.trunk.evaluator import vocabulary

JOB = "job.json"


@dataclass(frozen=True)
class Client:
    """A device to be: its name, tier and the rows of the training data that it holds."""

    name: str
    tier: str
    rows: Array


def read_data(job: Job, base: Path) -> Dataset:
    """The job's data; raises :class:`DataError`."""
    return load_dataset(job.data, base)


def share_out(
    job: Job, tiers: Mapping[str, FleetTier], data: Dataset, pooled: bool = False
) -> list[Client]:
    """Who holds what. Tiers are dealt at random, so that they have nothing to do with the data.

    Raises:
        ConfigError: more clients than examples, or a client without any.
    """
    names = [f"{tier}-{i + 1}" for tier, table in tiers.items() for i in range(table.clients)]
    owners = [tier for tier, table in tiers.items() for _ in range(table.clients)]
    table = replace(job.partition, seed=job.partition.seed + job.seed)
    if pooled:
        table = replace(table, kind="iid")
    shares = partition(data, len(names), table)
    dealt = np.random.default_rng([job.seed, 1]).permutation(len(names))
    return [
        Client(name, tier, shares[share])
        for name, tier, share in zip(names, owners, dealt, strict=True)
    ]


def fleet_of(
    job: Job, model: SplitModel, tiers: Mapping[str, Tier], example: torch.Tensor, classes: int
) -> Fleet:
    """The fleet that a method arranges; ``classes`` are those of the data."""
    return Fleet(
        model,
        tiers,
        example,
        vocabulary(model) if model.task == "tokens" else classes,
        options=tuple(job.cuts.options),
        cut_rank=job.cuts.rank,
        assignment=job.mixing if job.method in ("splitmix", "heterofl") else None,
    )


def check_cuts(job: Job, model: SplitModel) -> None:
    """Raise :class:`ExportError` unless the model can be cut where the job says.

    Methods that can do with whole models also take a cut behind the last block.
    """
    whole = model.depth if find(job.method, simulated_methods()).takes_whole else None
    for cut in (*(tier.cut for tier in job.tiers.values()), *job.cuts.options):
        if cut != whole:
            model.check_cut(cut)


def check_fit(model: SplitModel, example: torch.Tensor, classes: int) -> None:
    """Raise :class:`ConfigError` unless the model takes the data, and knows their classes.

    Args:
        model: the model.
        example: some inputs; a text is tokens, int64 (rows, positions).
        classes: number of classes, or of tokens.
    """
    shape = list(example.shape[1:])
    texts = not example.is_floating_point()
    if texts and model.task == "classes":
        raise ConfigError(
            "the examples are texts without labels, the model classifies; take a model of tokens, "
            "which learns what comes next"
        )
    if model.task == "tokens":
        if not texts:
            raise ConfigError(
                f"the model is one of tokens, the examples have shape {shape}; take a text"
            )
        if vocabulary(model) < classes:
            raise ConfigError(
                f"the data have {classes} tokens, the model knows {vocabulary(model)}; take the "
                "tokenizer that belongs to the model, or a model with more"
            )
    try:
        with torch.no_grad():
            answers = model.eval()(example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"the model does not take examples of shape {shape}: {error}") from error
    finally:
        model.train()
    if answers.dim() != (3 if texts else 2) or answers.shape[-1] < classes:
        raise ConfigError(
            f"the model's answers have shape {list(answers.shape[1:])}; the data have {classes} "
            "classes"
        )


def describe(job: Job, runtime: DeviceRuntime) -> str:
    """The job as JSON, to know it again."""
    return json.dumps({"job": asdict(job), "runtime": runtime}, indent=1, default=str) + "\n"


def resume(folder: Path, described: str) -> Checkpoint | None:
    """Where a run of the same job in a folder has stopped; None if nothing is there.

    Raises:
        ConfigError: the folder holds something else, or is none.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder for the run")
    if (folder / JOB).exists():
        if (folder / JOB).read_text("utf-8") != described:
            raise ConfigError(
                f"{folder} holds a run of another job; choose another folder, or remove it"
            )
        last = Checkpoint.read(folder)
        written = len(read_records(folder)) if (folder / METRICS).exists() else 0
        if last is not None and written < last.completed:
            raise ConfigError(
                f"{folder / METRICS} has {written} rounds, the checkpoint {last.completed}; "
                "remove the folder to start anew"
            )
        return last
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no simulation; choose another folder")
    return None


def put_down(folder: Path, described: str) -> None:
    """Note which job a folder is for; :class:`ConfigError` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / JOB, described.encode())
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
