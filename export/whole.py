"""Models that lie on the devices as a whole."""

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
from export.bases import Bases
from export.split import NoHead, SplitModel


def without_trunk(model: SplitModel) -> SplitModel:
    """A model that is cut behind its last block: its head stands where an auxiliary head would.

    Nothing is left above the cut but a block and a head that do nothing. Auxiliary heads that the
    model has are left out.
    """
    model = copy.deepcopy(model)
    whole = SplitModel(
        model.stem,
        [*model.block, nn.Identity()],
        NoHead(),
        model.task,
        channels_first=model.channels_first,
    )
    whole.aux[str(model.depth)] = model.head
    return whole


@dataclass(frozen=True)
class WholeBases:
    """Base networks that are cut behind their last block.

    Attributes:
        hub: one of them as the hub has it, and tiers that train it up to a cut.
        whole: one for tiers that train it as a whole, without other heads than its own.
        states: the initial tensors that are trained, each (bases, ...).
    """

    hub: SplitModel
    whole: SplitModel
    states: dict[str, Array]


def whole_bases(bases: Bases, cuts: Collection[int], example: Tensor, classes: int) -> WholeBases:
    """Base networks for a hub and for devices, cut behind their last block.

    Args:
        bases: of a model that was split by width.
        cuts: of the tiers that train bases up to a cut; there are auxiliary heads at them.
        example: some inputs (batch, ...).
        classes: number of classes, or of tokens.
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
    for name, tensor in hub.trained().items():  # heads at cuts start the same in every base
        each = [state.get(name, tensor).detach().cpu().numpy() for state in renamed]
        states[name] = np.stack(each)
    return WholeBases(hub, whole, states)


BASES = "bases.safetensors"
"""Beside an export's weights: the initial tensors that are trained, each (bases, ...)."""


def save_bases(states: Mapping[str, Array], folder: Path) -> None:
    """Write what :func:`load_bases` reads."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in states.items()}
    write_atomically(folder / BASES, save(whole))


def load_bases(folder: Path) -> dict[str, Array]:
    """The initial tensors of an export's bases; :class:`BundleError` if they are not there."""
    try:
        return load((folder / BASES).read_bytes())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read the bases {folder / BASES}: {error}") from error
