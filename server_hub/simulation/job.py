"""What ``job.toml`` may say: a model, data, a fleet, a method and how it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_sdk import config
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.checks import MAX_BASES
from export.errors import ExportError
from export.optimizers import check_hyper
from export.writer import Tier
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.registry import find, simulated_methods
from server_hub.methods.settings import BaseLoss, LocalTraining, RateSchedule
from server_hub.rounds.cut_policy import Cuts
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.network import Network
from server_hub.simulation.partition import PartitionTable
from server_hub.trunk.settings import TrunkTraining

DeviceRuntime = Literal["torch", "onnx", "executorch"]
"""What runs the devices' steps: the functional step in torch, or its exported graph."""


@dataclass(frozen=True, kw_only=True)
class FleetTier(Network):
    """A class of devices, with the network between them and the hub.

    Attributes:
        clients: how many there are.
        cut: cut layer, with methods that cut at every tier's own.
        codec: how activations are packed.
        gflops: what a device computes, in 10^9 operations per second; None for no limit.
        online_s: how long a device is there at a time, on average; None for always.
        offline_s: how long it is away in between, on average.
        budget: with Split-Mix, the part of the wide model that a device trains in a round.
        adversarial: with Split-Mix, whether devices train on examples that they make hard, where
            the job has any.
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
        if self.clients < 1:
            raise ValueError(f"clients is {self.clients}; a tier that no client has is no tier")
        if self.cut < 1:
            raise ValueError(f"cut is {self.cut}; a device holds one block or more")
        for name in ("gflops", "online_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0, or left out")
        if not 0 <= self.offline_s < math.inf:
            raise ValueError(f"offline_s is {self.offline_s}; it must be 0 or more")
        if self.offline_s and self.online_s is None:
            raise ValueError("offline_s says nothing without online_s")

    def exported(self, runtime: DeviceRuntime, batch: int, hardens: bool = False) -> Tier:
        """What is exported for the tier; ``hardens`` if the job has adversarial examples."""
        adversarial = hardens and self.adversarial
        return Tier(self.cut, self.codec, runtime, batch, adversarial=adversarial)


@dataclass(frozen=True)
class RoundsTable:
    """The rounds of the job.

    Attributes:
        count: rounds.
        per_round: devices that take part in a round, drawn at random; None for all.
        deadline_s: after so long a round ends without the updates that are missing.
    """

    count: int = 20
    per_round: int | None = None
    deadline_s: float = 3600.0

    def __post_init__(self) -> None:
        RoundRules(self.count, 1, self.per_round, self.deadline_s)


@dataclass(frozen=True)
class CutsTable(Cuts):
    """Cuts that move, with the methods that let them.

    Attributes:
        options: cuts that devices may move to, beside that of their tier.
        rank: rank of adapters at a cut, on both sides; None for that of all.
    """

    options: list[int] = field(default_factory=list)
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(cut < 1 for cut in self.options):
            raise ValueError(f"options are {self.options}; a device holds one block or more")
        if self.policy != "fixed" and not self.options:
            raise ValueError(f"the policy is {self.policy}, and there are no options to move to")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class SplitMixTable(BaseLoss):
    """How a model is split into base networks, and trained, with Split-Mix.

    Attributes:
        bases: how many.
        dual_norms: whether adversarial examples have norms of their own, if the loss has such
            examples. Then the robustness of an answer is chosen when it is asked for. Otherwise
            this is plain adversarial training.
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
        data: where examples come from.
        tiers: classes of devices.
        partition: who holds what.
        method: name of the training method.
        optimizer: of the devices.
        rounds: how many, with how many devices.
        local: training on the devices.
        trunk: training of the trunk.
        cuts: whether cuts move.
        mix: the base networks of Split-Mix.
        hub_gflops: what the hub computes, in 10^9 operations per second; None for no limit.
        schedule: how learning rates go over the rounds.
        evaluate_every: accuracy is measured after every so many rounds, and after the last.
        seed: of partition, draws of devices, order of batches and absences.
    """

    model: str
    data: DataTable
    tiers: dict[str, FleetTier]
    partition: PartitionTable = field(default_factory=PartitionTable)
    method: str = "fedsplitx"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    rounds: RoundsTable = field(default_factory=RoundsTable)
    local: LocalTraining = field(default_factory=LocalTraining)
    trunk: TrunkTraining = field(default_factory=TrunkTraining)
    cuts: CutsTable = field(default_factory=CutsTable)
    mix: SplitMixTable = field(default_factory=SplitMixTable)
    hub_gflops: float | None = None
    schedule: RateSchedule = "cosine"
    evaluate_every: int = 1
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
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every is {self.evaluate_every}; it must be 1 or more")
        wanted = self.rounds.per_round
        if wanted is not None and wanted > self.clients:
            raise ValueError(f"rounds.per_round is {wanted}; there are {self.clients} clients")

    @property
    def clients(self) -> int:
        """Devices in all."""
        return sum(tier.clients for tier in self.tiers.values())

    @property
    def mixing(self) -> BaseAssignment:
        """Who trains which bases; raises :class:`ConfigError` for a budget below one of them."""
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
        """Part of the devices that takes part in a round."""
        return (self.rounds.per_round or self.clients) / self.clients

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read the file; :class:`ConfigError` names what is wrong."""
        job = config.load(cls, path)
        if job.cuts != CutsTable() and not job.method.startswith("splitft"):
            raise ConfigError(
                f"{path}: [cuts] says how cuts move; with the method {job.method!r} they do not, "
                "they do with 'splitft'"
            )
        return job


def check_method(name: str) -> None:
    """Raise ValueError unless there is a method called ``name``."""
    try:
        find(name, simulated_methods())
    except ConfigError as error:
        raise ValueError(str(error)) from error


def methods_of(text: str) -> list[str]:
    """The methods in a list with commas; ``all`` for all. Raises :class:`ConfigError`."""
    names = (
        list(simulated_methods()) if text.strip() == "all" else [n.strip() for n in text.split(",")]
    )
    for name in names:
        try:
            check_method(name)
        except ValueError as error:
            raise ConfigError(f"--methods: {error}") from error
    return list(dict.fromkeys(names))
