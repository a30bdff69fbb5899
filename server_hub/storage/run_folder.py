"""The run folder: metrics, the trained model, a report and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.inference.metrics import Metric as Metric
from edge_sdk.protocol.tensors import Array

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RoundRecord:
    """What a round was like; a line of ``metrics.jsonl``.

    Attributes:
        round: its number, from 1 on.
        clock: seconds since the start of the job.
        seconds: how long it took, measuring included.
        devices: devices whose update counted.
        dropped: members that did not deliver, with the reason.
        local_loss: mean loss on the devices, weighted by samples; None in a round that does not
            train their heads.
        local_accuracy: mean accuracy on the devices' own examples, during training; or None.
        trunk_loss: mean loss per row on the trunk; None if no row came.
        trunk_steps: depth-merged steps.
        accuracy: by tier and path on the held-out examples; empty without any. It is what
            ``metric`` says.
        bytes: traffic since the start, by kind of message.
        costs: what a simulation has spent since the start, see :mod:`server_hub.simulation`.
        metric: what ``accuracy`` holds: accuracy, or for a model of tokens perplexity.
        cuts: of the devices that delivered, their cut layers in this round.
        moves: devices that go on with another tier's bundle after this round: ``device``, its
            ``cut``, the one that it goes ``to``, and the ``reason``.
        mixed: with base networks, what ``accuracy`` says of the best so many, mixed.
        order: their numbers, best first.
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

    @property
    def up(self) -> int:
        """Bytes that devices have sent since the start."""
        return sum(kind["up"] for kind in self.bytes.values())

    @property
    def down(self) -> int:
        """Bytes that devices have got since the start."""
        return sum(kind["down"] for kind in self.bytes.values())


def read_records(folder: Path) -> list[RoundRecord]:
    """The rounds of a run, from its ``metrics.jsonl``; a line that was cut off is left out."""
    lines = (folder / METRICS).read_text("utf-8").split("\n")[:-1]
    return [RoundRecord(**json.loads(line)) for line in lines]


class RunFolder:
    """Writes the files of one run.

    Args:
        folder: where.
        keep: rounds of an earlier run there that this one goes on from; None for a new run.
        metric: what the run measures on held-out examples.

    Raises:
        ConfigError: the folder holds another run already, or cannot be written.
    """

    def __init__(self, folder: Path, keep: int | None = None, metric: Metric = "accuracy") -> None:
        self.folder, self.metric = folder, metric
        self.records: list[RoundRecord] = []
        if keep is not None:
            self.records = read_records(folder)[:keep]
            lines = [json.dumps(asdict(record)) + "\n" for record in self.records]
            write_atomically(folder / METRICS, "".join(lines).encode())
        elif (folder / METRICS).exists():
            raise ConfigError(f"{folder} holds a run already; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error

    def append(self, record: RoundRecord) -> RoundRecord:
        """Add a round to ``metrics.jsonl``; returns it with the run's metric."""
        record = replace(record, metric=self.metric)
        self.records.append(record)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        return record

    def save_model(self, state: Mapping[str, Array], tier: str | None) -> Path:
        """Write the whole model as safetensors; ``SplitModel.load`` reads it."""
        path = self.folder / ("model.safetensors" if tier is None else f"model.{tier}.safetensors")
        # safetensors writes arrays as they lie in memory, whatever their order
        whole = {name: np.require(tensor, requirements="C") for name, tensor in state.items()}
        write_atomically(path, save(whole))
        return path
