"""The plan of a round: what a method says each device, the trunk and the average do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import Batch, Round
from edge_sdk.protocol.tensors import State
from export.split import SplitModel
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.methods.settings import LocalTraining
from server_hub.trunk.interface import TrunkCopy, TrunkPlan
from server_hub.trunk.settings import TrunkTraining


@dataclass(frozen=True)
class Participant:
    """A device as a method sees it: its tier, and the manifest of the tier's bundle."""

    tier: str
    manifest: Manifest


@dataclass(frozen=True)
class RoundContext:
    """What a method can base the plan of a round on.

    Attributes:
        number: number of the round; no two rounds have the same.
        position: which round of the job this is, from 1 to ``count``. A round that nobody delivers
            for does not count, so its position comes again.
        count: number of rounds of the job.
        rate: factor of the learning rates in this round.
        ready: devices that are ready, by name.
        drawn: names of those that the operator's rules have drawn.
        cuts: cuts of all devices that are connected.
        model: the hub's model.
        local: settings of the training on devices; ``hyper`` is complete.
        trunk: settings of the training of the trunk; ``hyper`` is complete.
    """

    number: int
    position: int
    count: int
    rate: float
    ready: Mapping[str, Participant]
    drawn: Sequence[str]
    cuts: Collection[int]
    model: SplitModel
    local: LocalTraining
    trunk: TrunkTraining


@dataclass(frozen=True)
class DevicePlan:
    """What a device does in a round, and what it owes.

    Attributes:
        tier: tier of the device.
        activations: when the device sends activations, and what comes back.
        epochs: local epochs; 0 if only activations are wanted.
        batch_size: rows of a local step.
        hyper: hyper-parameters of the local training, by name.
        seed: seed of the local training.
        staleness: with returned gradients, number of batches that may be under way beside the one
            whose gradient the device waits for.
        replica: name of the copy of the trunk that the device's activations train.
        bases: numbers of the base networks that the device trains; None for a single model.
        passes: how often the activations of each example may come.
        adversarial: weight of adversarial examples in the trunk's loss, from 0 to 1; None if the
            device does not train on any.
        untrained: names of tensors in the device's update that it has not trained.
    """

    tier: str
    activations: ActivationMode
    epochs: int
    batch_size: int
    hyper: Mapping[str, float]
    seed: int
    staleness: int = 0
    replica: str = "shared"
    bases: tuple[int, ...] | None = None
    passes: int = 1
    adversarial: float | None = None
    untrained: frozenset[str] = frozenset()

    def weight_of(self, batch: Batch) -> float:
        """Weight of a label of ``batch`` in the trunk's loss."""
        if self.adversarial is None:
            return 1.0
        return self.adversarial if batch.noise else 1 - self.adversarial

    def message(self, number: int, state: str | None, bases: Mapping[str, str] | None) -> Round:
        """The ``round`` message.

        Args:
            number: number of the round.
            state: hash of the tier's state, for a single model.
            bases: hash of the state of each base network of the tier, by number.
        """
        wanted = None
        if self.bases is not None and bases is not None:
            wanted = {str(base): bases[str(base)] for base in self.bases}
        return Round(
            round=number,
            state=state,
            epochs=self.epochs,
            batch_size=self.batch_size,
            hyper=dict(self.hyper),
            activations=self.activations,
            seed=self.seed,
            staleness=self.staleness,
            bases=wanted,
        )


@dataclass(frozen=True)
class RoundPlan:
    """What happens in a round.

    Attributes:
        devices: what each device does, by name; these devices are the round's members.
        trunk: how the trunk trains.
        state: tensors that the trunk starts from.
        average: averages the updates of devices and the copies of the trunk into the global model.
    """

    devices: Mapping[str, DevicePlan]
    trunk: TrunkPlan
    state: State
    average: Callable[[Sequence[DeviceUpdate], Sequence[TrunkCopy]], None]
