"""Models that are whole on the devices, and the file of base networks in an export."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import BundleError
from edge_sdk.protocol.tensors import Array
from export.bases.split_width import Bases
from export.cutting.split_model import NoHead, SplitModel


def without_trunk(model: SplitModel) -> SplitModel:
    """A copy of a model that is cut behind its last block, with its head as auxiliary head.

    Above the cut it has an identity as block and a :class:`NoHead`. Auxiliary heads of the model
    are left out.
    """
    model = copy.deepcopy(model)
    whole = SplitModel(
        model.stem,
        [*model.block, nn.Identity()],
        NoHead(),
        model.task,
        channels=model.channels,
    )
    whole.layout = model.layout
    whole.aux[str(model.depth)] = model.head
    return whole


@dataclass(frozen=True)
class WholeBases:
    """Base networks that are cut behind their last block.

    Attributes:
        hub: one base for the hub, and for tiers that train it up to a cut.
        whole: one base for tiers that train it whole, without heads at cuts.
        states: initial values of the trained tensors, each (bases, ...).
    """

    hub: SplitModel
    whole: SplitModel
    states: dict[str, Array]


def whole_bases(bases: Bases, cuts: Collection[int], example: Tensor, classes: int) -> WholeBases:
    """Cut base networks behind their last block, for the hub and for devices.

    Args:
        bases: base networks of a model that was split by width.
        cuts: cuts of the tiers that train part of a base; each gets an auxiliary head.
        example: inputs (batch, ...).
        classes: number of classes; for tokens the size of the vocabulary.

    Raises:
        ExportError: as :meth:`SplitModel.add_heads`.
    """
    whole = without_trunk(bases.model)
    hub = copy.deepcopy(whole)
    hub.add_heads(cuts, example, classes)
    last = f"aux.{bases.model.depth}."
    renamed = [
        {last + n.removeprefix("head.") if n.startswith("head.") else n: t for n, t in s.items()}
        for s in bases.states
    ]
    states = {}
    for name, tensor in hub.trained().items():  # heads at cuts start equal in all bases
        each = [state.get(name, tensor).detach().cpu().numpy() for state in renamed]
        states[name] = np.stack(each)
    return WholeBases(hub, whole, states)


BASES = "bases.safetensors"
"""File in an export with the initial values of the trained tensors, each (bases, ...)."""


def save_bases(states: Mapping[str, Array], folder: Path) -> None:
    """Write tensors, each (bases, ...), to the file that :func:`load_bases` reads."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in states.items()}
    write_atomically(folder / BASES, save(whole))


def load_bases(folder: Path) -> dict[str, Array]:
    """Read the initial tensors of an export's bases, each (bases, ...).

    Raises:
        BundleError: the file is missing or damaged.
    """
    try:
        return load((folder / BASES).read_bytes())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read the bases {folder / BASES}: {error}") from error
