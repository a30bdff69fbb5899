"""Reads what a run has trained: its model, or its base networks, with what is known about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.training.data import Examples
from export.adapters_lora.lora import fit_ranks
from export.bundles.model_source import model_of
from export.cutting.split_model import WEIGHTS, SplitModel
from export.formats.trained import TrainedModel
from server_hub.storage.run_folder import (
    METRICS,
    ROUNDS,
    JobDescription,
    RoundRecord,
    model_file,
    read_records,
)


@dataclass(frozen=True)
class TrainedRun:
    """A finished or running job, after its last completed round.

    Attributes:
        folder: folder of the run.
        job: what it trains; None in runs of earlier versions.
        index: the bundles that it trains with.
        records: its rounds; that of the last round of a running job may be missing.
    """

    folder: Path
    job: JobDescription | None
    index: BundleIndex
    records: Sequence[RoundRecord]

    @classmethod
    def read(cls, folder: Path, bundles: Path | None = None) -> TrainedRun:
        """Read a run.

        Args:
            folder: folder of the run.
            bundles: folder of its bundles; that of its description if None.

        Raises:
            ConfigError: there is no run, it has not completed a round, or its bundles are not
                known.
            BundleError: the bundles cannot be read.
        """
        job = JobDescription.read(folder) if folder.is_dir() else None
        if job is None and not (folder / METRICS).is_file():
            raise ConfigError(f"there is no run in {folder}: it has no {METRICS}")
        models = [*folder.glob("model.safetensors"), *folder.glob("model.*.safetensors")]
        if not models:
            raise ConfigError(
                f"the run in {folder} has not completed a round yet; its model is written then"
            )
        if bundles is None:
            if job is None:
                raise ConfigError(
                    f"the run in {folder} does not say which bundles it had; give --bundles"
                )
            if not job.bundles.is_dir():
                raise ConfigError(
                    f"the run's bundles are not in {job.bundles} any more; give --bundles. Those "
                    "of a simulation are never kept: export its model with cutlayer export"
                )
            bundles = job.bundles
        records = read_records(folder) if (folder / METRICS).is_file() else []
        return cls(folder, job, BundleIndex.read(bundles), records)

    @property
    def is_of_bases(self) -> bool:
        """Whether the run trains base networks."""
        return any(self.folder.glob(model_file("base-*")))

    @property
    def is_by_tier(self) -> bool:
        """Whether the run has a model per tier instead of one."""
        return not self.is_of_bases and not (self.folder / model_file(None)).exists()

    def trained(
        self, tier: str | None, bases: int | None, held_out: Path | None, whole: bool
    ) -> TrainedModel:
        """Build the trained model.

        Args:
            tier: tier whose model is taken in a run that has one per tier.
            bases: number of base networks, the best ones; None for all.
            held_out: ``.npz`` of examples to measure with; None for the run's own, if it has any
                that are still there.
            whole: whether formats are asked for that hold all tiers' models.

        Raises:
            ConfigError: the run has no such tier or number of base networks, or asks for a tier.
            BundleError: a model cannot be read or does not fit.
            DataError: the held-out examples do not fit the model.
        """
        about = self._about()
        first = self.index.manifest(next(iter(self.index.tiers)))
        examples = self._held_out(held_out)
        if examples is not None:
            examples = examples.fitted(first)
        if self.is_of_bases:
            model, states = self._bases(bases)
            about["title"] = f"{about['method']}, {len(states)} base networks"
            return TrainedModel(model, {}, self.index, about, states, examples)
        if bases is not None:
            raise ConfigError(f"the run in {self.folder} has no base networks; leave --bases out")
        if not self.is_by_tier:
            model = self._model(None)
            return TrainedModel(
                model, dict.fromkeys(self.index.tiers, model), self.index, about, (), examples
            )
        if tier is None and not whole:
            raise ConfigError(
                f"the run has a model for each tier; choose --tier, one of "
                f"{', '.join(self.index.tiers)}"
            )
        chosen = list(self.index.tiers) if tier is None else [tier]
        models = {name: self._model(name) for name in chosen if name in self.index.tiers}
        if not models:
            raise ConfigError(
                f"the run has no tier {tier!r}; its tiers are {', '.join(self.index.tiers)}"
            )
        return TrainedModel(next(iter(models.values())), models, self.index, about, (), examples)

    def _about(self) -> dict[str, Any]:
        """Where the model comes from, for its card."""
        version, method = "unknown", "unknown"  # in runs of earlier versions
        if self.job is not None:
            version, method = self.job.version, self.job.method
        evaluated = [record for record in self.records if record.accuracy]
        return {
            "title": f"{method} model",
            "version": version,
            "method": method,
            "rounds": self._rounds(),
            "tiers": {name: entry.cut for name, entry in self.index.tiers.items()},
            "source": self.index.model,
            "measured_by_hub": dict(evaluated[-1].accuracy) if evaluated else {},
        }

    def _rounds(self) -> int | None:
        """Number of rounds of the saved model; None if the file does not say it."""
        for path in sorted(self.folder.glob("model*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    known = (file.metadata() or {}).get(ROUNDS)
            except (OSError, SafetensorError):
                continue
            if known is not None:
                return int(known)
        return self.records[-1].round if self.records else None

    def _held_out(self, given: Path | None) -> Examples | None:
        if given is not None:
            return Examples.from_npz(given)
        own = None if self.job is None else self.job.held_out
        return Examples.from_npz(own) if own is not None and own.is_file() else None

    def _model(self, tier: str | None) -> SplitModel:
        path = self.folder / model_file(tier)
        override = None if self.job is None else self.job.model
        model = model_of(self.index.model, self.index.extra, override)
        held = _names(path)
        if (self.index.folder / WEIGHTS).is_file():
            # its heads say where activations have their channels
            model.load(self.index.folder / WEIGHTS)
            for depth in model.head_depths:
                if not any(name.startswith(f"aux.{depth}.") for name in held):
                    del model.aux[str(depth)]
        fit_ranks(model, _adapters(path))
        model.load(path)
        return model

    def _bases(self, count: int | None) -> tuple[SplitModel, list[Mapping[str, Tensor]]]:
        """One base network as a model, and the tensors of the best ones, best first."""
        order = next((record.order for record in reversed(self.records) if record.order), None)
        if order is None:
            found = self.folder.glob(model_file("base-*"))
            order = sorted(int(path.name.split("-")[1].split(".")[0]) for path in found)
        if count is not None and not 1 <= count <= len(order):
            raise ConfigError(
                f"the run has {len(order)} base networks; --bases is from 1 to {len(order)}"
            )
        models = [self._model(f"base-{base}") for base in order[:count]]
        tensors = ({n: t.detach() for n, t in m.tensors().items()} for m in models)
        return models[0], list(tensors)


def _names(path: Path) -> list[str]:
    """Names of the tensors in a file."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read the model {path}: {error}") from error


def _adapters(path: Path) -> dict[str, Tensor]:
    """The factors A of the adapters in a file, by name, for their ranks."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in _names(path) if ".lora_A." in name}
