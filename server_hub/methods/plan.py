"""The plan of a round, as a method makes it: for each device, the trunk, and the average."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import Round
from edge_sdk.protocol.tensors import State
from export.cutting.split_model import SplitModel
from export.steps.weight_decay import Decay
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.methods.settings import LocalTraining
from server_hub.trunk.interface import TrunkCopy, TrunkPlan
from server_hub.trunk.settings import TrunkTraining


@dataclass(frozen=True)
class ModelOffer:
    """Where a tier's present model is, as ``welcome``, ``round`` and ``stop`` say it.

    Attributes:
        state: hash of the state of a single model.
        bases: hashes of the states of base networks by number, best first.
    """

    state: str | None = None
    bases: dict[str, str] | None = None


@dataclass(frozen=True)
class Participant:
    """A ready device: the name of its tier, and the manifest of the tier's bundle."""

    tier: str
    manifest: Manifest


@dataclass(frozen=True)
class RoundContext:
    """The facts that a method's plan of a round depends on.

    Attributes:
        number: unique number of the round.
        position: position of the round in the job, from 1 to ``count``. A round in which no device
            delivers does not count, and its position comes again.
        count: number of rounds of the job.
        rate: factor of the learning rates in this round.
        ready: the ready devices by name.
        drawn: names of the devices that the operator's rules have drawn.
        cuts: cuts of all connected devices.
        model: the hub's model.
        local: settings of the training on devices; ``hyper`` holds every hyper-parameter.
        trunk: settings of the training of the trunk; ``hyper`` holds every hyper-parameter.
        decay: parameters that weight decay applies to on the devices, and so in the trunk.
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
    decay: Decay = "matrices"


@dataclass(frozen=True)
class DevicePlan:
    """The plan of one device in a round.

    Attributes:
        tier: tier of the device.
        activations: when the device sends activations, and what the hub sends back.
        epochs: number of local epochs; 0 for activations without training.
        batch_size: number of rows in a local step.
        hyper: hyper-parameters of the local training, by name.
        seed: seed of the local training.
        staleness: with returned gradients, the number of batches that may be in flight beside the
            one whose gradient the device waits for.
        replica: name of the copy of the trunk that the device's activations train.
        bases: numbers of the base networks that the device trains; None for a single model.
        passes: largest number of times that the device may send the activations of an example.
        adversarial: weight of adversarial examples in the trunk's loss, from 0 to 1; None if the
            device does not train on adversarial examples.
        untrained: names of the tensors in the device's update that the device does not train.
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
        """Return the weight of each label of ``batch`` in the trunk's loss."""
        if self.adversarial is None:
            return 1.0
        return self.adversarial if batch.noise else 1 - self.adversarial

    def message(self, number: int, offer: ModelOffer) -> Round:
        """The ``round`` message.

        Args:
            number: number of the round.
            offer: where the present model of the device's tier is.
        """
        bases = None
        if self.bases is not None and offer.bases is not None:
            bases = {str(base): offer.bases[str(base)] for base in self.bases}
        return Round(
            round=number,
            state=offer.state,
            epochs=self.epochs,
            batch_size=self.batch_size,
            hyper=dict(self.hyper),
            activations=self.activations,
            seed=self.seed,
            staleness=self.staleness,
            bases=bases,
        )


@dataclass(frozen=True)
class RoundPlan:
    """The plan of a round.

    Attributes:
        devices: plan of each device by name; these devices are the round's members.
        trunk: plan of the trunk.
        state: initial tensors of the trunk in this round, by name.
        average: averages the devices' updates and the copies of the trunk into the global model.
    """

    devices: Mapping[str, DevicePlan]
    trunk: TrunkPlan
    state: State
    average: Callable[[Sequence[DeviceUpdate], Sequence[TrunkCopy]], None]
