"""The job of a simulation, read from ``job.toml``: model, data, fleet, method and training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_sdk import config
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.checks import MAX_BASES
from export.bundles.writer import Tier
from export.errors import ExportError
from export.steps.optimizers import check_hyper
from export.steps.weight_decay import Decay
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.registry import find, simulated_methods
from server_hub.methods.settings import BaseLoss, LocalTraining, RateSchedule
from server_hub.rounds.cut_policy import Cuts
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.network import Network
from server_hub.simulation.partition import PartitionTable
from server_hub.trunk.settings import TrunkTraining

MAX_CLIENTS = 100_000
"""Largest number of devices of a tier."""

DeviceRuntime = Literal["torch", "onnx", "executorch"]
"""Runtime of the devices' steps: the functional step in torch, or the exported graph."""


@dataclass(frozen=True, kw_only=True)
class FleetTier(Network):
    """A class of devices, with the network between them and the hub.

    Attributes:
        clients: number of devices of the tier.
        cut: cut layer, for methods that cut each tier at its own cut layer.
        codec: codec of activations.
        gflops: compute of a device, in 10^9 operations per second; None for no limit.
        online_s: mean seconds that a device is online at a time; None for always.
        offline_s: mean seconds that a device is offline at a time.
        budget: with Split-Mix, the part of the wide model that a device trains in a round.
        adversarial: with Split-Mix, whether devices train on adversarial examples, if the
            robustness of the job is above 0.
    """

    clients: int
    cut: int
    codec: Literal["int8", "fp16"] = "int8"
    gflops: float | None = None
    online_s: float | None = None
    offline_s: float = 0.0
    budget: float = 1.0
    adversarial: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.clients <= MAX_CLIENTS:
            raise ValueError(f"clients is {self.clients}; it must be from 1 to {MAX_CLIENTS}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is {self.budget}; it must be above 0, and at most 1")
        if self.cut < 1:
            raise ValueError(f"cut is {self.cut}; a device holds at least one block")
        for name in ("gflops", "online_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, or left out")
        if not 0 <= self.offline_s < math.inf:
            raise ValueError(f"offline_s is {self.offline_s}; it must be 0 or more")
        if self.offline_s and self.online_s is None:
            raise ValueError(
                "offline_s has no effect without online_s; remove offline_s or set online_s"
            )

    def exported(self, runtime: DeviceRuntime, batch: int, hardens: bool = False) -> Tier:
        """Return the tier as the export takes it.

        Args:
            runtime: runtime of the devices' steps.
            batch: rows of a batch.
            hardens: whether the job trains on adversarial examples.
        """
        graphs = ["adversarial_train"] if hardens and self.adversarial else []
        return Tier(self.cut, self.codec, runtime, batch, graphs=graphs)


@dataclass(frozen=True)
class RoundsTable:
    """The rounds of the job.

    Attributes:
        count: number of rounds.
        per_round: number of devices that take part in a round, drawn at random; None for all.
        deadline_s: virtual seconds after which a round ends without the missing updates.
        quorum: fraction of the members whose updates end a round, after a grace. With 1 a round
            waits for all devices, also for one that has gone offline.
    """

    count: int = 20
    per_round: int | None = None
    deadline_s: float = 3600.0
    quorum: float = 1.0

    def __post_init__(self) -> None:
        RoundRules(self.count, 1, self.per_round, self.deadline_s, quorum=self.quorum)


@dataclass(frozen=True)
class CutsTable(Cuts):
    """Cuts that move, with methods that support moves: the table ``[cuts]``.

    Attributes:
        options: cut layers that devices may move to, beside that of their tier.
        rank: rank of the adapters on both sides of a cut; None for the rank of all adapters.
    """

    options: list[int] = field(default_factory=list)
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(cut < 1 for cut in self.options):
            raise ValueError(f"options are {self.options}; a device holds at least one block")
        if self.policy != "fixed" and not self.options:
            raise ValueError(f"policy is {self.policy!r}, which needs options; add cuts to options")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class SplitMixTable(BaseLoss):
    """Split-Mix: how a model is split into base networks and trained; the table ``[mix]``.

    Attributes:
        bases: number of base networks.
        dual_norms: whether adversarial examples have norms of their own, if the loss has
            adversarial examples. If true, every query chooses the robustness of its answer; if
            false, the training is plain adversarial training.
    """

    bases: int = 8
    dual_norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bases <= MAX_BASES:
            raise ValueError(f"bases is {self.bases}; it must be from 1 to {MAX_BASES}")


@dataclass(frozen=True)
class Job:
    """A fleet on one machine.

    Attributes:
        model: ``module:function`` that builds the model, or a model of transformers.
        data: source of the examples.
        tiers: tiers of the fleet by name.
        partition: partition of the examples over the devices.
        method: name of the training method.
        optimizer: optimizer of the devices.
        decay: parameters that weight decay applies to, on devices and in the trunk: ``matrices``
            leaves norms, biases and embeddings alone.
        rounds: number of rounds, and of devices per round.
        local: training on the devices.
        trunk: training of the trunk.
        cuts: whether and how cuts move.
        mix: the base networks of Split-Mix.
        start_from: run folder, checkpoint, folder or file of weights whose model the job goes on
            with; the initial model if None.
        hub_gflops: compute of the hub, in 10^9 operations per second; None for no limit.
        schedule: schedule of the learning rates over the rounds.
        evaluate_every: number of rounds from one evaluation to the next; the last round is always
            evaluated.
        keep_back: expected share of its examples that a device keeps back, does not train on, and
            evaluates the model on.
        seed: seed of the partition, the draw of devices, the order of batches and the times
            offline.
    """

    model: str
    data: DataTable
    tiers: dict[str, FleetTier]
    partition: PartitionTable = field(default_factory=PartitionTable)
    method: str = "fedsplitx"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    decay: Decay = "matrices"
    rounds: RoundsTable = field(default_factory=RoundsTable)
    local: LocalTraining = field(default_factory=LocalTraining)
    trunk: TrunkTraining = field(default_factory=TrunkTraining)
    cuts: CutsTable = field(default_factory=CutsTable)
    mix: SplitMixTable = field(default_factory=SplitMixTable)
    start_from: Path | None = None
    hub_gflops: float | None = None
    schedule: RateSchedule = "cosine"
    evaluate_every: int = 1
    keep_back: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ValueError("there are no tiers; add [tiers.NAME] with clients and cut")
        check_method(self.method)
        if self.hub_gflops is not None and not 0 < self.hub_gflops < math.inf:
            raise ValueError(f"hub_gflops is {self.hub_gflops}; it must be above 0")
        for name, table in (("local", self.local), ("trunk", self.trunk)):
            try:
                check_hyper(
                    self.optimizer if name == "local" else self.trunk.optimizer, table.hyper
                )
            except ExportError as error:
                raise ValueError(f"{name}.hyper: {error}") from error
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every is {self.evaluate_every}; it must be 1 or more")
        if not 0 <= self.keep_back < 1:
            raise ValueError(f"keep_back is {self.keep_back}; it must be from 0 to below 1")
        wanted = self.rounds.per_round
        if wanted is not None and wanted > self.clients:
            raise ValueError(f"rounds.per_round is {wanted}; there are only {self.clients} clients")

    @property
    def clients(self) -> int:
        """Number of devices of all tiers."""
        return sum(tier.clients for tier in self.tiers.values())

    @property
    def mixing(self) -> BaseAssignment:
        """The assignment of base networks to devices.

        Raises:
            ConfigError: a budget is smaller than one base network.
        """
        budgets = {name: tier.budget for name, tier in self.tiers.items()}
        mix = self.mix
        return BaseAssignment(
            mix.bases,
            budgets,
            mix.robustness,
            mix.dual_norms,
            mix.attack,
            mix.masked,
            self.seed,
        )

    @property
    def share(self) -> float:
        """Fraction of the devices that takes part in a round."""
        return (self.rounds.per_round or self.clients) / self.clients

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read the job from a TOML file.

        Raises:
            ConfigError: the file cannot be read, or a key or value is invalid.
        """
        job = config.load(cls, path)
        if job.cuts != CutsTable() and not job.method.startswith("splitft"):
            raise ConfigError(
                f"{path}: [cuts] has no effect with the method {job.method!r}; remove [cuts] or "
                "set method to 'splitft'"
            )
        return job


def check_method(name: str) -> None:
    """Raise ValueError unless ``name`` is the name of a method."""
    try:
        find(name, simulated_methods())
    except ConfigError as error:
        raise ValueError(str(error)) from error


def methods_of(text: str) -> list[str]:
    """Return the methods of the option ``--methods``: names separated by commas, or ``all``.

    Raises:
        ConfigError: a method is unknown.
    """
    names = (
        list(simulated_methods()) if text.strip() == "all" else [n.strip() for n in text.split(",")]
    )
    for name in names:
        try:
            check_method(name)
        except ValueError as error:
            raise ConfigError(f"--methods: {error}") from error
    return list(dict.fromkeys(names))
