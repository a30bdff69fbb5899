"""Settings of methods, and of training on devices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from edge_sdk.training.adversarial import Attack
from server_hub.aggregation.robust import RuleName
from server_hub.methods.base_assignment import BaseAssignment

RateSchedule = Literal["constant", "cosine", "step"]
"""How learning rates change over the rounds of a job."""


Form = Literal["merged", "paper"]
"""Form of FedSplitX: one store for devices and trunk, or two as in the paper."""


@dataclass(frozen=True)
class MethodConfig:
    """The training method: the table ``[method]`` of ``hub.toml``.

    Attributes:
        name: name of the method; :func:`server_hub.methods.registry.hub_methods` lists the names.
        form: form of FedSplitX.
        cut_rank: with SplitFT, the rank of the adapters in the block that activations enter; None
            for the rank of the other blocks.
        clip: an update is shortened to this multiple of the median distance that devices move a
            layer; infinity for no bound. See :mod:`server_hub.aggregation.update_bound`.
        rule: rule that averages the copies of a layer: ``mean``, or a robust one of
            :mod:`server_hub.aggregation.robust`.
    """

    name: str = "fedsplitx"
    form: Form = "merged"
    cut_rank: int | None = None
    clip: float = 1.5
    rule: RuleName = "mean"

    def __post_init__(self) -> None:
        if self.cut_rank is not None and self.cut_rank < 1:
            raise ValueError(f"cut_rank is {self.cut_rank}; it must be 1 or more")
        if not self.name.startswith("splitft") and self.cut_rank is not None:
            raise ValueError(
                'cut_rank has no effect unless name is "splitft" or "splitft-u"; remove cut_rank '
                "or set name"
            )
        if not self.clip >= 1:
            raise ValueError(f"clip is {self.clip}; it must be 1 or more, or inf for no bound")
        if self.name != "fedsplitx" and self.form != "merged":
            raise ValueError(f"{self.name} has no form {self.form!r}; leave form out")


@dataclass(frozen=True)
class LocalTraining:
    """Training on the devices: the table ``[local]``.

    Attributes:
        epochs: local epochs per round.
        batch_size: rows per local step.
        hyper: hyper-parameters of the optimizer that the bundles were exported with.
        staleness: with returned gradients, the number of batches that a device may have in flight
            beside the one whose gradient it waits for. With 0 every step uses the newest weights;
            a larger number hides the latency of the link.
        max_norm: gradients of a step are scaled down to this norm; infinity for no bound.
    """

    epochs: int = 1
    batch_size: int = 32
    hyper: dict[str, float] = field(default_factory=dict)
    staleness: int = 0
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if self.staleness < 0:
            raise ValueError(f"staleness is {self.staleness}, must be 0 or more")
        if not self.max_norm > 0:
            raise ValueError(f"max_norm is {self.max_norm}, must be above 0, or inf for no bound")


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """The loss of base networks on devices; see :mod:`server_hub.methods.splitmix`.

    Attributes:
        robustness: weight of adversarial examples in the loss, from 0 (none) to 1.
        attack: the attack that makes adversarial examples, in units of the inputs.
        masked: whether the loss leaves out the classes that the device has no examples of.
    """

    robustness: float = 0.0
    attack: Attack = field(default_factory=Attack)
    masked: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.robustness <= 1:
            raise ValueError(f"robustness is {self.robustness}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SplitMixConfig(BaseLoss):
    """Training of base networks with Split-Mix: the table ``[mix]`` of ``hub.toml``.

    Attributes:
        budgets: by tier, the fraction of the wide model that a device trains in a round. A tier
            without an entry has the budget 1.
        seed: seed of the random assignment of base networks to devices.
    """

    budgets: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def of(self, bases: int) -> BaseAssignment:
        """Return the assignment of ``bases`` base networks to devices.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        for tier, budget in self.budgets.items():
            if not 0 < budget <= 1:
                raise ValueError(f"budgets.{tier} is {budget}; it must be above 0, at most 1")


def learning_rate_factor(schedule: RateSchedule, number: int, count: int) -> float:
    """Return the factor of the learning rates in round ``number`` of ``count``.

    The schedule ``step`` is that of FedSplitX (arXiv 2310.14579): 0.1 from half of the rounds on,
    0.01 from three quarters on.

    Args:
        schedule: name of the schedule.
        number: position of the round in the job, from 1 on.
        count: number of rounds of the job.
    """
    done = (number - 1) / count
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0
