"""Configuration of the hub: what ``hub.toml`` may say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from server_hub.aggregation.robust import FEWEST
from server_hub.gateway.limits import Limits, Listen
from server_hub.methods.settings import LocalTraining, MethodConfig, RateSchedule, SplitMixConfig
from server_hub.rounds.cut_policy import Cuts
from server_hub.rounds.rounds import RoundRules
from server_hub.storage.run_folder import JobDescription
from server_hub.trunk.settings import TrunkTraining


@dataclass(frozen=True)
class HubConfig:
    """Configuration of a hub.

    Attributes:
        bundles: folder written by ``cutlayer export``.
        tokens: file written by ``cutlayer token``.
        run: folder for metrics, report and the trained model.
        releases: folder of releases for devices that only download; they get the model of the job
            if not given.
        model: ``module:function`` that builds the model; that of the export if not given.
        start_from: run folder, checkpoint, folder or file of weights whose model the job goes on
            with; that of the bundles if not given.
        held_out: ``.npz`` with x and y to evaluate the model on.
        evaluate_every: number of rounds from one evaluation to the next; the last round is always
            evaluated.
        evaluation_s: seconds that devices have to evaluate a model on what they keep back, when an
            evaluation is due; 0 does not ask them.
        schedule: how the learning rates of devices and trunk change over the rounds.
        keep_serving: go on answering after the last round, until interrupted.
        leave_s: seconds after the last round that the hub waits for devices to leave; ten times as
            long for devices that still fetch the model or ask questions.
    """

    bundles: Path
    tokens: Path
    run: Path = Path("runs/hub")
    releases: Path | None = None
    model: str | None = None
    start_from: Path | None = None
    held_out: Path | None = None
    evaluate_every: int = 1
    evaluation_s: float = 30.0
    schedule: RateSchedule = "cosine"
    keep_serving: bool = False
    leave_s: float = 60.0
    listen: Listen = field(default_factory=Listen)
    method: MethodConfig = field(default_factory=MethodConfig)
    rounds: RoundRules = field(default_factory=RoundRules)
    local: LocalTraining = field(default_factory=LocalTraining)
    trunk: TrunkTraining = field(default_factory=TrunkTraining)
    cuts: Cuts = field(default_factory=Cuts)
    mix: SplitMixConfig = field(default_factory=SplitMixConfig)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.model == "":
            raise ValueError("model is empty; leave it out to take the model of the export")
        if self.evaluate_every < 1:
            raise ValueError(f"evaluate_every is {self.evaluate_every}, must be at least 1")
        if not 0 <= self.evaluation_s < math.inf:
            raise ValueError(f"evaluation_s is {self.evaluation_s}, must be 0 or more")
        if not self.leave_s >= 0:
            raise ValueError(f"leave_s is {self.leave_s}, must be 0 or more")
        drawn = self.rounds.per_round
        if self.method.rule != "mean" and drawn is not None and drawn < FEWEST:
            raise ValueError(
                f"per_round is {drawn}, and the rule {self.method.rule!r} cannot tell a hostile "
                f"copy from others with fewer than {FEWEST}; raise per_round or set rule to 'mean'"
            )
        if self.local.staleness + 2 > self.limits.window:
            raise ValueError(
                f"staleness is {self.local.staleness}; with a window of {self.limits.window} "
                f"messages it can be {self.limits.window - 2} at most"
            )

    def description(self, method: str) -> JobDescription:
        """What the run of this hub trains, for its folder.

        Args:
            method: name of the method.
        """
        return JobDescription(
            version=metadata.version("cutlayer"),
            method=method,
            bundles=self.bundles.absolute(),
            model=self.model,
            held_out=None if self.held_out is None else self.held_out.absolute(),
        )
