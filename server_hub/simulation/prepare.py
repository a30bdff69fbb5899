"""Preparation of a simulation: shares of the data, checks of the job, and the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edge_sdk.bundle.ranges import Ranges
from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.files import why
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples
from export.bundles.writer import Tier
from export.cutting.input_ranges import find_ranges
from export.cutting.split_model import SplitModel
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
    """A device before it runs: its name, its tier, and the row numbers of its training data."""

    name: str
    tier: str
    rows: Array


@dataclass(frozen=True)
class FederatedData:
    """Examples by device, which replace the data source and the partition of a job.

    Attributes:
        shares: the examples of each device, by the device's name. The devices of a tier of N are
            ``TIER-1`` to ``TIER-N``.
        held_out: examples that accuracy or perplexity is measured on.
        classes: number of classes; for a model of tokens, the size of the vocabulary.
        task: ``classes`` (one label per row) or ``tokens`` (one label per position).
    """

    shares: Mapping[str, Examples]
    held_out: Examples
    classes: int
    task: str = "classes"

    def dataset(self) -> Dataset:
        """Return all examples as one data set, one share after the other."""
        shares = self.shares.values()
        train = Examples(
            np.concatenate([share.x for share in shares]),
            np.concatenate([share.y for share in shares]),
        )
        return Dataset(train, self.held_out, self.classes, self.task)

    def clients(self, tiers: Mapping[str, FleetTier]) -> list[Client]:
        """Return the devices with their rows of :meth:`dataset`.

        Args:
            tiers: tiers of the job by name.

        Raises:
            ConfigError: the names in ``shares`` are not those of the devices of the tiers.
        """
        tier_of = {
            f"{tier}-{i + 1}": tier for tier, table in tiers.items() for i in range(table.clients)
        }
        if tier_of.keys() != self.shares.keys():
            raise ConfigError(
                f"there are shares for {', '.join(self.shares)}; the job's devices are "
                f"{', '.join(tier_of)}"
            )
        ends = np.cumsum([len(share) for share in self.shares.values()])
        rows = np.split(np.arange(ends[-1]), ends[:-1])
        return [
            Client(name, tier_of[name], own) for name, own in zip(self.shares, rows, strict=True)
        ]


def read_data(job: Job, base: Path) -> Dataset:
    """Read the data of a job.

    Raises:
        DataError: the data cannot be read.
    """
    return load_dataset(job.data, base)


def share_out(
    job: Job, tiers: Mapping[str, FleetTier], data: Dataset, pooled: bool = False
) -> list[Client]:
    """Share the training data out to the clients.

    Shares are dealt to the tiers at random, so the tier of a client does not depend on its data.

    Args:
        job: gives the partition and the seed.
        tiers: tiers by name; their clients get shares.
        data: data set whose ``train`` is shared out.
        pooled: whether to use equal random shares instead of the job's partition.

    Raises:
        ConfigError: there are more clients than rows, the partition does not fit the data, or a
            client would have no rows.
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
    """Return the fleet for a method to arrange.

    Args:
        job: gives the cuts, and the assignment of base networks.
        model: the model.
        tiers: what is exported for each tier, by name.
        example: some inputs, (rows, …).
        classes: number of classes of the model.
    """
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
    """Raise :class:`ExportError` unless the model can be cut at every cut layer of the job.

    Methods that support whole models also accept a cut behind the last block.
    """
    whole = model.depth if find(job.method, simulated_methods()).takes_whole else None
    for cut in (*(tier.cut for tier in job.tiers.values()), *job.cuts.options):
        if cut != whole:
            model.check_cut(cut)


def check_fit(model: SplitModel, example: torch.Tensor, classes: int) -> int:
    """Check that the model accepts the data and has all of their classes.

    Args:
        model: the model.
        example: some inputs, (rows, …) float32; for texts, tokens (rows, positions) int64.
        classes: number of classes of the data; for texts, the size of the vocabulary.

    Returns:
        Number of classes of the model, which may have more than the data.

    Raises:
        ConfigError: the model does not fit the data.
    """
    shape = list(example.shape[1:])
    texts = not example.is_floating_point()
    if texts and model.task == "classes":
        raise ConfigError(
            "the examples are texts without labels, and the model is a classifier; take a model "
            "of tokens, which learns to predict the next token"
        )
    if model.task == "tokens":
        if not texts:
            raise ConfigError(
                f"the model is a model of tokens, and the examples have shape {shape}; take a text"
            )
        if vocabulary(model) < classes:
            raise ConfigError(
                f"the data have {classes} tokens, the model knows {vocabulary(model)}; take the "
                "tokenizer of the model, or a model with a larger vocabulary"
            )
        longest = find_ranges(model, example[:, :2]).longest
        if longest is not None and longest < shape[0]:
            raise ConfigError(
                f"the texts have {shape[0]} tokens, and the model takes {longest} at most; set "
                f"length in [data] to {longest}"
            )
    try:
        with torch.no_grad():
            answers = model.eval()(example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"the model rejects examples of shape {shape}: {error}") from error
    finally:
        model.train()
    if answers.dim() != (3 if texts else 2) or answers.shape[-1] < classes:
        raise ConfigError(
            f"the model's answers have shape {list(answers.shape[1:])}, and the data have "
            f"{classes} classes; take a model with at least as many classes"
        )
    return int(answers.shape[-1])


def check_values(data: Dataset, ranges: Ranges) -> None:
    """Raise :class:`DataError` for a value or label of the data that the model does not take."""
    for name, part in (("training data", data.train), ("held-out data", data.held_out)):
        try:
            ranges.fit(part.x, part.y)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error


def describe(job: Job, runtime: DeviceRuntime) -> str:
    """Return job and runtime as JSON, which identifies the job of a run folder.

    Keys that earlier versions did not have are left out at what those versions did, so that their
    runs resume. They decayed all parameters, so a run of theirs resumes with ``decay = "all"``.
    """
    fields = asdict(job)
    first = {"start_from": None, "keep_back": 0.0, "decay": "all"}
    for table, was in ((fields, first), (fields["local"], {"max_norm": math.inf})):
        for name, value in was.items():
            if table[name] == value:
                del table[name]
    return json.dumps({"job": fields, "runtime": runtime}, indent=1, default=str) + "\n"


def resume(folder: Path, described: str) -> Checkpoint | None:
    """Return the checkpoint of an interrupted or finished run in a folder; None if there is none.

    Args:
        folder: the run folder.
        described: description of the job, from :func:`describe`.

    Raises:
        ConfigError: the folder has a run of another job, other files or a damaged checkpoint, or
            is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder for the run")
    if (folder / JOB).exists():
        found = (folder / JOB).read_text("utf-8")
        if found == _decaying_all(described) != described:
            raise ConfigError(
                f"{folder} holds a run in which all parameters decay, as in versions before the "
                'key decay; add decay = "all" to the job to go on with it'
            )
        if found != described:
            raise ConfigError(
                f"{folder} holds a run of another job; choose another folder with --run, and to "
                f"go on with the model of this one add --start-from {folder}; or remove it"
            )
        last = Checkpoint.read(folder)
        written = len(read_records(folder)) if (folder / METRICS).exists() else 0
        if last is not None and written < last.completed:
            raise ConfigError(
                f"{folder / METRICS} has {written} rounds, the checkpoint has {last.completed}; "
                "remove the folder to start again"
            )
        return last
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and has no simulation; choose another folder")
    return None


def _decaying_all(described: str) -> str:
    """The description of the same job with ``decay = "all"``."""
    fields = json.loads(described)
    fields["job"].pop("decay", None)
    return json.dumps(fields, indent=1) + "\n"


def put_down(folder: Path, described: str) -> None:
    """Write the description of the job to the run folder; create the folder if it is missing.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / JOB, described.encode())
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {why(error)}") from error


class FleetTokens:
    """Implements :class:`server_hub.gateway.tokens.Tokens` with tokens that are no secrets.

    The tokens are the same in every run, because the token of a device decides how long the device
    waits before it connects again.
    """

    def __init__(self, clients: Iterable[Client]) -> None:
        self._tiers = {client.name: client.tier for client in clients}

    def token_of(self, device: str) -> str:
        """Return the token of the device of this name."""
        return f"token of {device}"

    def device_of(self, token: str) -> str | None:
        device = token.removeprefix("token of ")
        return device if device in self._tiers else None

    def tier_of(self, device: str) -> str | None:
        return self._tiers.get(device)

    def is_download_only(self, device: str) -> bool:
        return False
