"""The run folder: metrics of every round, and the trained model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.files import naming, read_text, why
from edge_sdk.inference.metrics import Metric as Metric
from edge_sdk.protocol.tensors import Array

METRICS = "metrics.jsonl"
JOB = "run.json"
"""File that says what a run has trained: with which bundles, by which method."""
ROUNDS = "rounds"
"""Key of the number of rounds in the metadata of a model's file."""

PREVIOUS = "previous"
"""Folder of the model before the last one that was saved, under the same names."""


@dataclass(frozen=True)
class RoundRecord:
    """The record of one round, which is a line of ``metrics.jsonl``.

    Attributes:
        round: number of rounds that count, this one included.
        clock: seconds from the start of the job to the end of the round.
        seconds: duration of the round, without the evaluation.
        devices: number of devices whose updates were averaged.
        dropped: by member that did not deliver, the reason.
        local_loss: mean loss on the devices, weighted by samples; None in a round that does not
            train their heads.
        local_accuracy: mean accuracy on the devices' own examples during training; None if the
            devices report none.
        trunk_loss: mean loss of a row on the trunk; None if the trunk had no row with a label.
        trunk_steps: number of depth-merged steps.
        accuracy: the value of ``metric`` on the held-out examples, by tier and path; empty if the
            round was not evaluated.
        bytes: bytes since the start by kind of message and direction, ``up`` or ``down``.
        costs: operations and seconds of a simulation since the start.
        metric: metric in ``accuracy``: ``accuracy``, or ``perplexity`` for a model of tokens.
        cuts: cut layer in this round of each device that delivered, by device name.
        moves: moves after this round, each with the keys ``device``, ``cut`` (present cut), ``to``
            (new cut) and ``reason``.
        mixed: accuracy of the mixture of the best N base networks, by N; empty without base
            networks.
        order: numbers of the base networks, best first.
        on_devices: what devices say about examples that they keep back: ``asked``, ``answered``,
            ``silent`` and ``without`` (numbers of devices), and ``tiers``. For each tier these are
            ``devices`` and ``labels`` (numbers), and ``paths``: for each way to answer the value of
            ``metric`` as ``mean``, weighted by labels, and as the quantiles ``p10``, ``p50`` and
            ``p90`` over devices. Empty if no device was asked.
    """

    round: int
    clock: float
    seconds: float
    devices: int
    dropped: dict[str, str]
    local_loss: float | None
    local_accuracy: float | None
    trunk_loss: float | None
    trunk_steps: int
    accuracy: dict[str, dict[str, float]]
    bytes: dict[str, dict[str, int]]
    costs: dict[str, float] = field(default_factory=dict)
    metric: Metric = "accuracy"
    cuts: dict[str, int] = field(default_factory=dict)
    moves: list[dict[str, Any]] = field(default_factory=list)
    mixed: dict[str, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    on_devices: dict[str, Any] = field(default_factory=dict)

    @property
    def device_means(self) -> dict[str, dict[str, float]]:
        """The means of what devices say, by tier and path, as in ``accuracy``."""
        tiers: dict[str, Any] = self.on_devices.get("tiers", {})
        return {
            tier: {path: figures["mean"] for path, figures in said["paths"].items()}
            for tier, said in tiers.items()
        }

    @property
    def up(self) -> int:
        """Bytes that devices have sent since the start."""
        return sum(kind["up"] for kind in self.bytes.values())

    @property
    def down(self) -> int:
        """Bytes that devices have received since the start."""
        return sum(kind["down"] for kind in self.bytes.values())


@dataclass(frozen=True)
class JobDescription:
    """What a run trains.

    Attributes:
        version: version of Cutlayer.
        method: name of the method.
        bundles: folder of the bundles.
        model: model to build instead of the one that the bundles name; None for that one.
        held_out: ``.npz`` of held-out examples; None without.
    """

    version: str
    method: str
    bundles: Path
    model: str | None
    held_out: Path | None

    @classmethod
    def read(cls, folder: Path) -> JobDescription | None:
        """Read the description of a run; None if there is none, as of earlier versions.

        Raises:
            ConfigError: the file is damaged.
        """
        path = folder / JOB
        if not path.exists():
            return None
        try:
            raw = json.loads(read_text(path))
            held_out = None if raw["held_out"] is None else Path(raw["held_out"])
            known = {part.name: raw[part.name] for part in fields(cls)}
            return cls(**known | {"bundles": Path(raw["bundles"]), "held_out": held_out})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({error}); give --bundles instead") from error


def model_file(name: str | None) -> str:
    """Name of the file of a model: of a tier or a base network, or of a single model (None)."""
    return "model.safetensors" if name is None else f"model.{name}.safetensors"


def read_records(folder: Path) -> list[RoundRecord]:
    """Read the rounds of a run from its ``metrics.jsonl``, without an incomplete last line.

    Raises:
        ConfigError: a line is no record of a round.
    """
    lines = read_text(folder / METRICS).split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(RoundRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder / METRICS}, line {number}, is no record of a round: it was changed or "
                "damaged, or another version has written it"
            ) from error
    return records


class RunFolder:
    """Writes the files of one run.

    Args:
        folder: folder to write to; it need not exist.
        keep: number of rounds of an earlier run in the folder that this run continues; None for a
            new run.
        metric: metric on held-out examples.

    Raises:
        ConfigError: the folder holds another run, or cannot be written.
    """

    def __init__(self, folder: Path, keep: int | None = None, metric: Metric = "accuracy") -> None:
        self.folder, self.metric = folder, metric
        self.records: list[RoundRecord] = []
        self._written = 0  # number of records that are in the file
        if keep is not None:
            self.records = read_records(folder)[:keep]
            self._written = len(self.records)
            lines = [json.dumps(asdict(record), allow_nan=False) + "\n" for record in self.records]
            write_atomically(folder / METRICS, "".join(lines).encode())
        elif (folder / METRICS).exists():
            raise ConfigError(
                f"{folder} holds a run already; choose another folder with --run, and to go on "
                f"with the model of this one add --start-from {folder}"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {why(error)}") from error

    def add(self, record: RoundRecord) -> RoundRecord:
        """Add a round, which :meth:`write` writes; return its record with the run's metric."""
        record = replace(record, metric=self.metric)
        self.records.append(record)
        return record

    def write(self) -> None:
        """Append the rounds that are not in ``metrics.jsonl`` yet, all of them or none.

        Raises:
            OSError: the file cannot be written. The rounds stay, for the next call.
        """
        new = [json.dumps(asdict(r), allow_nan=False) + "\n" for r in self.records[self._written :]]
        path = self.folder / METRICS
        with naming(path), open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            data = "".join(new).encode()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise
        self._written = len(self.records)

    def save_job(self, job: JobDescription) -> None:
        """Write :data:`JOB`."""
        text = json.dumps(asdict(job), indent=2, default=str) + "\n"
        with naming(self.folder / JOB):
            write_atomically(self.folder / JOB, text.encode())

    def save_model(
        self, state: Mapping[str, Array], tier: str | None, rounds: int | None = None
    ) -> Path:
        """Write a whole model as safetensors, which ``SplitModel.load`` reads.

        The model that was saved before stays in the folder :data:`PREVIOUS`. Each of the two files
        is whole at any time.

        Args:
            state: tensors of the whole model by name.
            tier: name that tells files apart: a tier or a base network; None for a single model.
            rounds: number of rounds that the model was trained for, which the file's metadata says.

        Returns:
            Path of the file.
        """
        path = self.folder / model_file(tier)
        if path.exists():
            (self.folder / PREVIOUS).mkdir(exist_ok=True)
            write_atomically(self.folder / PREVIOUS / path.name, path.read_bytes())
        # safetensors writes the memory of an array, and ignores its order
        whole = {name: np.require(tensor, requirements="C") for name, tensor in state.items()}
        write_atomically(path, save(whole, None if rounds is None else {ROUNDS: str(rounds)}))
        return path
