"""The methods by the names that jobs and commands call them by."""

from __future__ import annotations

from dataclasses import replace

from server_hub.aggregation.layer_store import State
from server_hub.config import MethodConfig
from server_hub.methods.baselines.accsfl import ACCSFL
from server_hub.methods.baselines.ampere import AMPERE
from server_hub.methods.baselines.depthfl import DEPTHFL
from server_hub.methods.baselines.fedavg import CENTRALIZED, EXC, FEDAVG
from server_hub.methods.baselines.fjord import FJORD
from server_hub.methods.baselines.heterofl import HETEROFL
from server_hub.methods.baselines.splitfed import SPLITFED_V1, SPLITFED_V2
from server_hub.methods.fedsplitx import fedsplitx
from server_hub.methods.fleet import JobOutline, Recipe
from server_hub.methods.method import Method
from server_hub.methods.splitft import SPLITFT, SPLITFT_U, splitft, splitft_u
from server_hub.methods.splitmix import SPLITMIX, splitmix
from server_hub.methods.supersfl import SUPERSFL, supersfl


def _merged(initial: State, outline: JobOutline) -> Method:
    return fedsplitx(initial, "merged", outline.local_epochs)


def _paper(initial: State, outline: JobOutline) -> Method:
    return fedsplitx(initial, "paper", outline.local_epochs)


def method_of(settings: MethodConfig, initial: State, outline: JobOutline) -> Method:
    """The method that a hub is to use."""
    if settings.name == "splitmix":
        return splitmix(initial, outline)
    if settings.name == "supersfl":
        return supersfl(initial, outline)
    if settings.name.startswith("splitft"):
        compose = splitft_u if settings.name == "splitft-u" else splitft
        return compose(initial, replace(outline, cut_rank=settings.cut_rank))
    return fedsplitx(initial, settings.form, outline.local_epochs)


RECIPES: dict[str, Recipe] = {
    "fedsplitx": Recipe("FedSplitX", _merged),
    "fedsplitx-paper": Recipe("FedSplitX (paper's form)", _paper),
    "exc": EXC,
    "fedavg": FEDAVG,
    "depthfl": DEPTHFL,
    "fjord": FJORD,
    "heterofl": HETEROFL,
    "accsfl": ACCSFL,
    "splitfed-v1": SPLITFED_V1,
    "splitfed-v2": SPLITFED_V2,
    "splitft": SPLITFT,
    "splitft-u": SPLITFT_U,
    "supersfl": SUPERSFL,
    "splitmix": SPLITMIX,
    "ampere": AMPERE,
    "centralized": CENTRALIZED,
}
