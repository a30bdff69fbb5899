"""The starting point of a job: the model of an earlier run, or other weights, to train further."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Array, State
from export.adapters_lora.low_rank import adapter_pairs
from export.bases.exported import BASES
from export.cutting.split_model import SplitModel
from export.tensor_names import TIED, is_slot, layer_of
from server_hub.aggregation.adapters import MergedAdapters
from server_hub.aggregation.layer_store import NotFinite, check_finite
from server_hub.methods.method import Method
from server_hub.storage.run_folder import METRICS, model_file, read_records

CHECKPOINT = "checkpoint.safetensors"
NUMBERS = "numbers"
"""Key of a checkpoint's metadata, by which the file is known."""


@dataclass(frozen=True)
class Started:
    """What a job has taken over from its starting point.

    Attributes:
        path: file or folder that was read.
        tensors: number of tensors of the model that were taken over.
        slots: number of optimizer slots that were taken over.
        new: auxiliary heads that start as they were exported, because the source has none there.
        left: auxiliary heads of the source that the job has no tier for.
        fresh: why optimizer slots start at zero; empty if they do not, or if the method keeps none.
    """

    path: str
    tensors: int
    slots: int
    new: Sequence[str] = ()
    left: Sequence[str] = ()
    fresh: str = ""

    def __str__(self) -> str:
        slots = f" and {self.slots} optimizer slots" if self.slots else ""
        parts = [f"started from {self.path}: {self.tensors} tensors{slots} taken over"]
        if self.fresh:
            parts.append(f"optimizer slots start at zero: {self.fresh}")
        if self.new:
            parts.append(f"{', '.join(self.new)} start as exported: not in the source")
        if self.left:
            parts.append(f"{', '.join(self.left)} left out: no tier is cut there")
        return "; ".join([*parts, "rounds, learning rates, update bounds and cuts begin anew"])


@dataclass(frozen=True)
class StartingPoint:
    """A model on disk.

    Attributes:
        path: file or folder that was read, for messages.
        stores: tensors and optimizer slots by name, by store, of a checkpoint or of exported bases.
        models: whole models, frozen tensors included, by the name that tells their files apart.
        order: numbers of the base networks, best first; empty if it is not known.
    """

    path: Path
    stores: Mapping[str, State] = field(default_factory=dict)
    models: Mapping[str | None, State] = field(default_factory=dict)
    order: Sequence[int] = ()

    @classmethod
    def read(cls, path: Path, tiers: Collection[str]) -> StartingPoint:
        """Read a run folder, a folder of bundles or other weights, a checkpoint or a weights file.

        Args:
            path: the file or folder.
            tiers: tiers that a run folder may have a model of.

        Raises:
            ConfigError: there is no model, or a file is damaged.
        """
        if path.is_file():
            if CHECKPOINT == path.name or NUMBERS in _metadata(path):
                return cls._of_checkpoint(path)
            return cls(path, models={None: _load(path)})
        if not path.is_dir():
            raise ConfigError(
                f"there is no {path} to start from; give a run folder, a checkpoint or a file of "
                "weights"
            )
        models = _models(path, tiers)
        if (path / CHECKPOINT).exists():
            point = cls._of_checkpoint(path / CHECKPOINT)
            return cls(point.path, point.stores, models, point.order)
        if (path / BASES).exists():  # an export of base networks, each tensor (bases, ...)
            stacked = _load(path / BASES)
            count = min((len(tensor) for tensor in stacked.values()), default=0)
            stores = {f"base {b}": {n: t[b] for n, t in stacked.items()} for b in range(count)}
            return cls(path / BASES, stores)
        if not models:
            raise ConfigError(
                f"there is no model in {path}: it has no {CHECKPOINT} and no {model_file(None)}"
            )
        # of a single model nothing but its file counts
        return cls(path, models=models, order=() if None in models else _last_order(path))

    @classmethod
    def _of_checkpoint(cls, path: Path) -> StartingPoint:
        try:
            numbers, stores = read_checkpoint(path)
        except Exception as error:  # safetensors raises errors of its own
            raise ConfigError(f"cannot start from {path}: {error}") from error
        return cls(path, stores, order=numbers.get("offers", {}).get("order", ()))

    def states_for(self, stores: Collection[str], cuts: Mapping[str, int]) -> Mapping[str, State]:
        """Return the tensors to start each store of a job from, by name of the store.

        Args:
            stores: names of the stores of the job's aggregation.
            cuts: cut by tier.

        Raises:
            ConfigError: the source is of a method that holds its model in another way.
        """
        wanted = set(stores)
        found: Mapping[str, State] = self.stores or {
            str(name or "all").replace("base-", "base "): state
            for name, state in self.models.items()
        }
        if found.keys() == wanted:
            return found
        several = any(name.startswith("base ") for name in wanted)
        if len(found) == 1 and not several:
            (state,) = found.values()
            return dict.fromkeys(wanted, state)
        if found.keys() == cuts.keys() and wanted == {"devices", "trunk"}:
            # a tier's file has the devices' layers up to its cut, and the trunk's above
            deepest, shallowest = max(cuts, key=cuts.__getitem__), min(cuts, key=cuts.__getitem__)
            return {"devices": found[deepest], "trunk": found[shallowest]}
        raise ConfigError(
            f"{self.path} holds the models {_listed(found)}, and this job trains "
            f"{_listed(wanted)}; start from a run of the same method with the same tiers and bases"
        )


def start_from(path: Path, method: Method, model: SplitModel, cuts: Mapping[str, int]) -> Started:
    """Set the global model of a job to that of an earlier run, or to other weights.

    Args:
        path: run folder, checkpoint, folder or file of weights.
        method: method of the job; its global model is set.
        model: the job's model, for the names of tensors and for those that are frozen.
        cuts: cut by tier.

    Returns:
        What was taken over.

    Raises:
        ConfigError: there is no model at ``path``, or it does not fit; nothing is changed.
    """
    point, aggregation = StartingPoint.read(path, cuts), method.aggregation
    present = aggregation.stores()
    sources = point.states_for(present, cuts)
    trained = model.trained()
    frozen = {n: t.detach().cpu().numpy() for n, t in model.tensors().items() if n not in trained}
    for whole in point.models.values():
        _check_frozen(point.path, whole, frozen)
    stores: dict[str, State] = {}
    any_rank = isinstance(aggregation, MergedAdapters)
    for store, wanted in present.items():
        own = {n: t for n, t in sources[store].items() if n not in frozen}
        stores[store] = _fitted(point.path, own, wanted, any_rank)
    if point.order and sorted(point.order) != sorted(aggregation.order):
        raise ConfigError(f"{point.path} has the bases {list(point.order)}, and this job others")
    aggregation.restore(stores)
    if point.order:
        aggregation.order = list(point.order)
    return _report(point.path, stores, sources, present)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, State]]:
    """Read a checkpoint: its numbers, and its tensors by name, by store."""
    with safe_open(path, "numpy") as file:
        numbers = json.loads(file.metadata()[NUMBERS])
    stores: dict[str, State] = {}
    for key, tensor in load(path.read_bytes()).items():
        store, _, name = key.partition("/")
        stores.setdefault(store, {})[name] = tensor
    return numbers, stores


def _check_frozen(path: Path, whole: Mapping[str, Array], frozen: Mapping[str, Array]) -> None:
    """Raise :class:`ConfigError` unless a model has the frozen weights of the bundles."""
    for name, tensor in frozen.items():
        if name not in whole or tensor.dtype.kind != "f":
            continue
        _check_tensor(path, name, whole[name], tensor)
        if not np.array_equal(whole[name], tensor):
            raise ConfigError(
                f"{name} is frozen, and {path} has other values than the bundles; export bundles "
                "with the weights that its adapters were trained on"
            )


def _check_tensor(path: Path, name: str, found: Array, wanted: Array) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ConfigError(
            f"{path} does not fit the model: {name} is {found.dtype} {list(found.shape)} there and "
            f"{wanted.dtype} {list(wanted.shape)} in the model"
        )


def _fitted(
    path: Path, found: Mapping[str, Array], wanted: Mapping[str, Array], any_rank: bool
) -> State:
    """Return the tensors for a store: those found, and new heads and slots as they are.

    Args:
        path: of the source, for messages.
        found: trained tensors of the source, and slots, by name.
        wanted: present tensors of the store by name.
        any_rank: whether the store may hold adapters of a lower rank than the model's.

    Raises:
        ConfigError: a tensor is missing, has no place, does not fit or is not finite.
    """
    for name in sorted(
        {n for n in found if not is_slot(n)} ^ {n for n in wanted if not is_slot(n)}
    ):
        if not name.startswith("aux."):
            where = found.get(name, wanted.get(name))
            assert where is not None
            sides = ["nothing", f"{where.dtype} {list(where.shape)}"]
            there, here = reversed(sides) if name in found else sides
            raise ConfigError(
                f"{path} does not fit the model: {name} is {there} there and {here} in the model"
            )
    lower = _of_lower_rank(found, wanted) if any_rank else set()
    taken = {n: t for n, t in found.items() if n in wanted and not is_slot(n)}
    for name, tensor in taken.items():
        if name not in lower:
            _check_tensor(path, name, tensor, wanted[name])
    try:
        check_finite(taken)
    except NotFinite as error:
        raise ConfigError(f"cannot start from {path}: {error}") from error
    return {**wanted, **taken, **_slots(found, wanted, taken)}


def _slots(
    found: Mapping[str, Array], wanted: Mapping[str, Array], taken: Mapping[str, Array]
) -> State:
    """Return the optimizer slots for a store: the source's if it has all of them, else zeros.

    Slots of a new head are zero.
    """
    zeros = {n: np.zeros_like(taken.get(_parameter(n), t)) for n, t in wanted.items() if is_slot(n)}
    layers = {*map(layer_of, taken), TIED}
    old = [n for n in zeros if layer_of(n) in layers]
    if all(n in found and found[n].shape == zeros[n].shape for n in old):
        return zeros | {n: found[n] for n in old}
    return zeros


def _of_lower_rank(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> set[str]:
    """Return the names of adapters that differ from those wanted in a lower rank only."""
    names: set[str] = set()
    for a, b in adapter_pairs(dict(wanted)):
        if a in found and b in found and len(found[a]) < len(wanted[a]):
            (rank, inputs), (outputs, other) = found[a].shape, found[b].shape
            if rank == other and (outputs, inputs) == (len(wanted[b]), wanted[a].shape[1]):
                names |= {a, b}
    return names


def _parameter(slot: str) -> str:
    return slot.partition("/")[2]


def _report(
    path: Path,
    stores: Mapping[str, State],
    sources: Mapping[str, State],
    present: Mapping[str, State],
) -> Started:
    """Return what was taken over, counted over all stores."""
    pairs = [(stores[name], sources[name], present[name]) for name in stores]
    tensors = sum(1 for new, old, _ in pairs for n in new if n in old and not is_slot(n))
    slots = sum(1 for new, old, _ in pairs for n in new if is_slot(n) and new[n] is old.get(n))
    there = {layer_of(n) for _, old, _ in pairs for n in old if n.startswith("aux.")}
    here = {layer_of(n) for _, _, own in pairs for n in own if n.startswith("aux.")}
    fresh = ""
    if not slots and any(is_slot(n) for own in present.values() for n in own):
        has = any(is_slot(n) for old in sources.values() for n in old)
        fresh = "the source's are of another optimizer" if has else "the source has none"
    return Started(str(path), tensors, slots, sorted(here - there), sorted(there - here), fresh)


def _metadata(path: Path) -> Mapping[str, str]:
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot start from {path}, it is no safetensors file: {error}"
        ) from error


def _load(path: Path) -> State:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot start from {path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot start from {path}: numpy has no type for its tensors, {error}; save it as "
            "float32"
        ) from error


def _models(folder: Path, tiers: Collection[str]) -> dict[str | None, State]:
    """Read the models of a run folder: a single one, one per base network, or one per tier."""
    if (folder / model_file(None)).exists():
        return {None: _load(folder / model_file(None))}
    bases = [p.name for p in folder.glob(model_file("base-*"))]
    names = [n.split(".")[1] for n in bases if re.fullmatch(r"model\.base-\d+\.safetensors", n)]
    names = names or [tier for tier in tiers if (folder / model_file(tier)).exists()]
    return {name: _load(folder / model_file(name)) for name in sorted(names)}


def _last_order(folder: Path) -> Sequence[int]:
    """Read the order of base networks after the last round of a run; empty if there is none."""
    records = read_records(folder) if (folder / METRICS).exists() else []
    return records[-1].order if records else ()


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
