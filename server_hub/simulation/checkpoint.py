"""The checkpoint of a simulated run: written after each round, read when the run resumes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import State
from server_hub.hub import Hub
from server_hub.simulation.devices import Meter
from server_hub.storage.starting_point import CHECKPOINT as FILE
from server_hub.storage.starting_point import NUMBERS, read_checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        number: number of the round, from 1 on.
        completed: number of completed rounds; a round that no device delivered for is not one.
        clock: virtual seconds since the start of the run.
        wall: real seconds that the run has taken.
        up: bytes received from the devices, by kind of message.
        down: bytes sent to the devices, by kind of message.
        meter: operations and seconds of the steps.
        stores: tensors of the global model by name, by store.
        moves: the devices' tiers after their moves, and the state of the cut policy. A file of an
            older version has no moves; they are empty then.
        offers: the order of base networks; empty in a file of an older version.
        missed: by device, the number of rounds in a row that it has missed; empty in a file of an
            older version.
        method: what the method remembers beside the model; empty in a file of an older version.
    """

    number: int
    completed: int
    clock: float
    wall: float
    up: dict[str, int]
    down: dict[str, int]
    meter: Meter
    stores: dict[str, State]
    moves: dict[str, Any] = field(default_factory=dict)
    offers: dict[str, Any] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, hub: Hub, clock: float, wall: float, meter: Meter) -> Checkpoint:
        """Return the state of a hub at the end of a round."""
        traffic = hub.gateway.traffic
        return cls(
            hub.rounds.number,
            hub.rounds.completed,
            clock,
            wall,
            dict(traffic.up),
            dict(traffic.down),
            meter,
            {name: dict(state) for name, state in hub.method.aggregation.stores().items()},
            hub.cut_moves.state(),
            hub.publisher.state(),
            dict(hub.rounds.missed),
            hub.method.state(),
        )

    def apply(self, hub: Hub) -> None:
        """Put a new hub into this state."""
        hub.rounds.number, hub.rounds.completed = self.number, self.completed
        hub.gateway.traffic.up.update(self.up)
        hub.gateway.traffic.down.update(self.down)
        hub.method.aggregation.restore(self.stores)
        hub.rounds.missed = dict(self.missed)
        if self.moves:
            hub.cut_moves.restore(self.moves)
        if self.offers:
            hub.publisher.restore(self.offers)
        if self.method:
            hub.method.restore(self.method)

    def write(self, folder: Path) -> None:
        """Write the checkpoint to the folder of the run; it replaces the previous one."""
        tensors = {
            # safetensors writes the memory of an array as it is, so it must be contiguous.
            f"{store}/{name}": np.require(tensor, requirements="C")
            for store, state in self.stores.items()
            for name, tensor in state.items()
        }
        numbers = {
            "number": self.number,
            "completed": self.completed,
            "clock": self.clock,
            "wall": self.wall,
            "up": self.up,
            "down": self.down,
            "meter": asdict(self.meter),
            "moves": self.moves,
            "offers": self.offers,
            "missed": self.missed,
            "method": self.method,
        }
        write_atomically(folder / FILE, save(tensors, {NUMBERS: json.dumps(numbers)}))

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """Read the checkpoint of a run from its folder; None if there is none.

        Raises:
            ConfigError: the file is damaged.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            numbers, stores = read_checkpoint(path)
            numbers["meter"] = Meter(**numbers["meter"])
            return cls(stores=stores, **numbers)
        except Exception as error:  # safetensors raises errors of its own
            raise ConfigError(
                f"{path} cannot be read ({error}); remove the run's folder"
            ) from error
