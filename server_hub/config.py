"""Configuration of the hub: what ``hub.toml`` may say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_sdk.training.adversarial import Attack
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.fedsplitx import Form
from server_hub.rounds.cut_policy import PolicyName
from server_hub.rounds.rounds import RoundRules

RateSchedule = Literal["constant", "cosine", "step"]


@dataclass(frozen=True)
class Listen:
    """Where to listen. Port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8765

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, must be from 0 to 65535")


@dataclass(frozen=True)
class MethodConfig:
    """The training method.

    Attributes:
        name: ``fedsplitx``; ``splitft`` with bundles that take gradients, ``splitft-u`` with those
            that have the model's head, ``supersfl`` with those that fuse gradients, ``splitmix``
            with those of base networks.
        form: of FedSplitX.
        cut_rank: of SplitFT, rank of the adapters in the block that activations enter; None for
            that of all.
    """

    name: Literal["fedsplitx", "splitft", "splitft-u", "supersfl", "splitmix"] = "fedsplitx"
    form: Form = "merged"
    cut_rank: int | None = None

    def __post_init__(self) -> None:
        if self.cut_rank is not None and self.cut_rank < 1:
            raise ValueError(f"cut_rank is {self.cut_rank}; it must be 1 or more")
        if not self.name.startswith("splitft") and self.cut_rank is not None:
            raise ValueError('cut_rank says nothing without name = "splitft"')
        if self.name != "fedsplitx" and self.form != "merged":
            raise ValueError(f"{self.name} has no form {self.form!r}; leave form out")


@dataclass(frozen=True)
class LocalTraining:
    """Training on the devices.

    Attributes:
        epochs: local epochs per round.
        batch_size: rows per local step.
        hyper: hyper-parameters of the optimizer that the bundles were exported with.
        staleness: with returned gradients, batches that a device may have on their way beside the
            one whose gradient it waits for; 0 is exact, more hides what the link takes.
    """

    epochs: int = 1
    batch_size: int = 32
    hyper: dict[str, float] = field(default_factory=dict)
    staleness: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if self.staleness < 0:
            raise ValueError(f"staleness is {self.staleness}, must be 0 or more")


@dataclass(frozen=True)
class TrunkTraining:
    """Training of the trunk.

    Attributes:
        device: torch device; ``auto`` takes a GPU if there is one.
        optimizer: ``sgd`` or ``adamw``.
        hyper: its hyper-parameters.
        max_rows: rows of one merged step at most; a merged batch is a larger batch.
        mix_rows: rows that wait in a buffer, so that every step draws batches of many devices;
            0 for steps on batches as they come.
        wait_s: how long a step waits for more rows to merge, in seconds.
        max_norm: gradients of a step are scaled down to this norm, so that no device can throw
            the trunk far off with activations that are large but finite.
        threads: torch threads, 0 for torch's default.
        arena_mb: shared memory for the payloads of one step, in MiB.
    """

    device: str = "auto"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    hyper: dict[str, float] = field(default_factory=dict)
    max_rows: int = 256
    mix_rows: int = 0
    wait_s: float = 0.02
    max_norm: float = 25.0
    threads: int = 0
    arena_mb: int = 256

    def __post_init__(self) -> None:
        if self.mix_rows < 0:
            raise ValueError(f"mix_rows is {self.mix_rows}, must be 0 or more")
        if self.max_rows < 1 or self.arena_mb < 1:
            raise ValueError("max_rows and arena_mb must be at least 1")


@dataclass(frozen=True)
class Cuts:
    """How devices get other cuts during a job; see :mod:`server_hub.rounds.cut_policy`.

    A device may move between the bundles for its runtime, codec and precision.

    Attributes:
        policy: ``fixed``, ``latency`` or ``adaptive``.
        wait_s: how long a round waits for devices that load another bundle.
        memory_mb: what training takes, by tier; a device that says how much it has gets no tier
            that takes more.
    """

    policy: PolicyName = "fixed"
    wait_s: float = 60.0
    memory_mb: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.wait_s <= 0:
            raise ValueError(f"wait_s is {self.wait_s}, must be above 0")


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """The loss of base networks on devices; see :mod:`server_hub.methods.splitmix`.

    Attributes:
        robustness: weight of examples made hard, where devices make them; 0 for none.
        attack: how they are made, in units of the inputs.
        masked: whether it leaves out classes that the device has no examples of.
    """

    robustness: float = 0.0
    attack: Attack = field(default_factory=Attack)
    masked: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.robustness <= 1:
            raise ValueError(f"robustness is {self.robustness}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SplitMixConfig(BaseLoss):
    """Who trains which base networks, and how.

    Attributes:
        budgets: by tier, the part of the wide model that a device trains in a round; all of it for
            tiers that are not named.
        seed: of the draws of bases.
    """

    budgets: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def of(self, bases: int) -> BaseAssignment:
        """For so many bases; raises :class:`ConfigError` for a budget below one of them."""
        return BaseAssignment(
            bases,
            self.budgets,
            self.robustness,
            attack=self.attack,
            masked=self.masked,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Limits:
    """What a peer may do.

    Attributes:
        max_frame: bytes of one frame.
        window: messages that a device may leave unacknowledged.
        session_s: seconds that a session without a connection is kept.
        hello_s: seconds that a new connection has for its hello.
        connections: open connections at most.
        blob_piece: bytes of one piece of a blob.
    """

    max_frame: int = 64 * 2**20
    window: int = 16
    session_s: float = 60.0
    hello_s: float = 10.0
    connections: int = 1024
    blob_piece: int = 256 * 1024

    def __post_init__(self) -> None:
        if self.window < 2 or self.max_frame < 2 * self.blob_piece:
            raise ValueError("window must be at least 2, max_frame at least twice blob_piece")


@dataclass(frozen=True)
class HubConfig:
    """Everything that a hub needs to know.

    Attributes:
        bundles: folder written by ``cutlayer export``.
        tokens: file written by ``cutlayer token``.
        run: folder for metrics, report and the trained model.
        model: ``module:function`` that builds the model; that of the export if not given.
        held_out: ``.npz`` with x and y to measure accuracy on after every round.
        schedule: how the learning rates of devices and trunk go over the rounds.
        keep_serving: go on answering after the last round, until interrupted.
    """

    bundles: Path
    tokens: Path
    run: Path = Path("runs/hub")
    model: str | None = None
    held_out: Path | None = None
    schedule: RateSchedule = "cosine"
    keep_serving: bool = False
    listen: Listen = field(default_factory=Listen)
    method: MethodConfig = field(default_factory=MethodConfig)
    rounds: RoundRules = field(default_factory=RoundRules)
    local: LocalTraining = field(default_factory=LocalTraining)
    trunk: TrunkTraining = field(default_factory=TrunkTraining)
    cuts: Cuts = field(default_factory=Cuts)
    mix: SplitMixConfig = field(default_factory=SplitMixConfig)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.local.staleness + 2 > self.limits.window:
            raise ValueError(
                f"staleness is {self.local.staleness}; with a window of {self.limits.window} "
                f"messages it can be {self.limits.window - 2} at most"
            )


def learning_rate_factor(schedule: RateSchedule, number: int, count: int) -> float:
    """What the learning rate is multiplied with in round ``number`` of ``count``, from 1 on.

    ``step`` is FedSplitX's: a tenth from half of the rounds on, a hundredth from three quarters.
    """
    done = (number - 1) / count
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0
