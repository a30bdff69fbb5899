"""The registry of methods: their recipes by the names in configurations and commands.

A package outside of Cutlayer adds a method with an entry point in the group ``cutlayer.methods``.
The name of the entry point is the name of the method, and its object is a
:class:`server_hub.methods.fleet.Recipe`. A name of Cutlayer's own methods cannot be replaced.
"""

from __future__ import annotations

from importlib import metadata

from edge_sdk.errors import ConfigError
from server_hub.methods.baselines.accsfl import ACCSFL
from server_hub.methods.baselines.ampere import AMPERE
from server_hub.methods.baselines.depthfl import DEPTHFL
from server_hub.methods.baselines.fedavg import CENTRALIZED, EXC, FEDAVG
from server_hub.methods.baselines.fjord import FJORD
from server_hub.methods.baselines.heterofl import HETEROFL
from server_hub.methods.baselines.splitfed import SPLITFED_V1, SPLITFED_V2
from server_hub.methods.fedsplitx import FEDSPLITX, FEDSPLITX_PAPER
from server_hub.methods.fleet import Recipe
from server_hub.methods.splitft import SPLITFT, SPLITFT_U
from server_hub.methods.splitmix import SPLITMIX
from server_hub.methods.supersfl import SUPERSFL

GROUP = "cutlayer.methods"
"""Group of the entry points that add methods."""

METHODS: dict[str, Recipe] = {
    "fedsplitx": FEDSPLITX,
    "fedsplitx-paper": FEDSPLITX_PAPER,
    "splitft": SPLITFT,
    "splitft-u": SPLITFT_U,
    "supersfl": SUPERSFL,
    "splitmix": SPLITMIX,
}
"""Recipes of the methods that hubs and simulations offer, by name."""

BASELINES: dict[str, Recipe] = {
    "exc": EXC,
    "fedavg": FEDAVG,
    "depthfl": DEPTHFL,
    "fjord": FJORD,
    "heterofl": HETEROFL,
    "accsfl": ACCSFL,
    "splitfed-v1": SPLITFED_V1,
    "splitfed-v2": SPLITFED_V2,
    "ampere": AMPERE,
    "centralized": CENTRALIZED,
}
"""Recipes of the baselines, which only simulations offer, by name."""


def hub_methods() -> dict[str, Recipe]:
    """Return the methods that a hub offers: those of Cutlayer, and those of installed packages.

    Raises:
        ConfigError: the object of an entry point is not a :class:`Recipe`.
    """
    found = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    return METHODS | {name: _load(entry) for name, entry in found.items() if name not in METHODS}


def simulated_methods() -> dict[str, Recipe]:
    """Return the methods that a simulation offers: those of a hub, and the baselines.

    Raises:
        ConfigError: the object of an entry point is not a :class:`Recipe`.
    """
    return hub_methods() | BASELINES


def find(name: str, methods: dict[str, Recipe]) -> Recipe:
    """Return the recipe called ``name``.

    Raises:
        ConfigError: ``methods`` holds no such recipe.
    """
    if name not in methods:
        hint = "; it is a baseline, for cutlayer simulate" if name in BASELINES else ""
        raise ConfigError(f"there is no method {name!r}{hint}; there are {', '.join(methods)}")
    return methods[name]


def _load(entry: metadata.EntryPoint) -> Recipe:
    recipe = entry.load()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"the method {entry.name!r} of {entry.value} is no Recipe")
    return recipe
