"""A simulated run on disk after each round, so that one that was interrupted goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, save

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import State
from server_hub.hub import Hub
from server_hub.simulation.devices import Meter

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a run is after a round.

    Attributes:
        number: of the round.
        completed: rounds that count.
        clock: virtual seconds.
        wall: real seconds that the run has taken.
        up: bytes by kind of message from the devices.
        down: bytes by kind of message to the devices.
        meter: what was computed.
        stores: the global model.
        moves: where devices have moved to, and what the policy of cuts keeps; empty in a file that
            was written before that was kept.
        offers: the order of base networks; empty likewise.
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

    @classmethod
    def of(cls, hub: Hub, clock: float, wall: float, meter: Meter) -> Checkpoint:
        """What a hub is at the end of a round."""
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
        )

    def apply(self, hub: Hub) -> None:
        """Make a hub what it was."""
        hub.rounds.number, hub.rounds.completed = self.number, self.completed
        hub.gateway.traffic.up.update(self.up)
        hub.gateway.traffic.down.update(self.down)
        hub.method.aggregation.restore(self.stores)
        if self.moves:
            hub.cut_moves.restore(self.moves)
        if self.offers:
            hub.publisher.restore(self.offers)

    def write(self, folder: Path) -> None:
        """Write it in place of the last one."""
        tensors = {
            f"{store}/{name}": np.require(tensor, requirements="C")  # they are saved as they lie
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
        }
        write_atomically(folder / FILE, save(tensors, {"numbers": json.dumps(numbers)}))

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The last one of a run; None if there is none."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                numbers = json.loads(file.metadata()["numbers"])
            stores: dict[str, State] = {}
            for key, tensor in load(path.read_bytes()).items():
                store, _, name = key.partition("/")
                stores.setdefault(store, {})[name] = tensor
            numbers["meter"] = Meter(**numbers["meter"])
            return cls(stores=stores, **numbers)
        except Exception as error:  # safetensors raises its own
            raise ConfigError(
                f"{path} cannot be read ({error}); remove the run's folder"
            ) from error
