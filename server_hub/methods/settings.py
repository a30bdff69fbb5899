"""Settings of methods, and of training on devices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from edge_sdk.training.adversarial import Attack
from server_hub.methods.base_assignment import BaseAssignment

RateSchedule = Literal["constant", "cosine", "step"]
"""How learning rates change over the rounds of a job."""


Form = Literal["merged", "paper"]
"""Form of FedSplitX: one store for devices and trunk, or two as in the paper."""


@dataclass(frozen=True)
class MethodConfig:
    """The training method: the table ``[method]`` of ``hub.toml``.

    Attributes:
        name: name of a method, see :func:`server_hub.methods.registry.hub_methods`.
        form: form of FedSplitX.
        cut_rank: of SplitFT, rank of the adapters in the block that activations enter; None for
            the rank of all blocks.
    """

    name: str = "fedsplitx"
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
    """Training on the devices: the table ``[local]``.

    Attributes:
        epochs: local epochs per round.
        batch_size: rows per local step.
        hyper: hyper-parameters of the optimizer that the bundles were exported with.
        staleness: with returned gradients, number of batches that a device may have under way
            beside the one whose gradient it waits for. 0 is exact; more hides the link's latency.
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


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """The loss of base networks on devices; see :mod:`server_hub.methods.splitmix`.

    Attributes:
        robustness: weight of adversarial examples in the loss, from 0 (none) to 1.
        attack: the attack that makes adversarial examples, in units of the inputs.
        masked: whether the loss leaves out classes that the device has no examples of.
    """

    robustness: float = 0.0
    attack: Attack = field(default_factory=Attack)
    masked: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.robustness <= 1:
            raise ValueError(f"robustness is {self.robustness}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SplitMixConfig(BaseLoss):
    """Which base networks devices train, and how: the table ``[mix]``.

    Attributes:
        budgets: by tier, the part of the wide model that a device trains in a round; 1 for tiers
            that are not named.
        seed: seed of the draws of base networks.
    """

    budgets: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def of(self, bases: int) -> BaseAssignment:
        """The assignment of ``bases`` base networks.

        Raises:
            ConfigError: a budget is not above 0 and at most 1.
        """
        return BaseAssignment(
            bases,
            self.budgets,
            self.robustness,
            attack=self.attack,
            masked=self.masked,
            seed=self.seed,
        )


def learning_rate_factor(schedule: RateSchedule, number: int, count: int) -> float:
    """Factor of the learning rates in round ``number`` of ``count``, from 1 on.

    ``step`` is FedSplitX's schedule: a tenth from half of the rounds on, a hundredth from three
    quarters on.
    """
    done = (number - 1) / count
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0
