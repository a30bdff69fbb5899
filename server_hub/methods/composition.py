"""Composes the method of a hub from the hub's configuration and bundles."""

from __future__ import annotations

from collections.abc import Mapping

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import State
from export.whole import load_bases
from server_hub.config import HubConfig
from server_hub.methods.fleet import JobOutline
from server_hub.methods.method import Method
from server_hub.methods.registry import find, hub_methods


def compose(
    config: HubConfig, index: BundleIndex, manifests: Mapping[str, Manifest], initial: State
) -> Method:
    """Compose the method that the configuration names.

    Args:
        config: configuration of the hub.
        index: index of the bundles.
        manifests: manifest by tier.
        initial: initial trained tensors of the model by name. They are not used for base networks,
            whose initial tensors are in the export.

    Raises:
        ConfigError: the method is unknown; or the bundles hold base networks and the method trains
            a single model, or the reverse.
    """
    settings = config.method
    paper = settings.form == "paper"
    recipe = find("fedsplitx-paper" if paper else settings.name, hub_methods())
    bases = {manifest.bases for manifest in manifests.values()}
    if bases != {0} and not (recipe.trains_bases and len(bases) == 1):
        raise ConfigError(
            'the bundles are of base networks of one model; set name = "splitmix" in [method], and '
            "export all tiers together"
        )
    if recipe.trains_bases and bases == {0}:
        raise ConfigError(
            f"{recipe.title} trains base networks, and the bundles are of one model; export with "
            "bases = 8 in tiers.toml"
        )
    outline = JobOutline(
        config.rounds.count,
        config.local.epochs,
        optimizer=index.optimizer,
        cut_rank=settings.cut_rank,
        assignment=config.mix.of(bases.pop()) if recipe.trains_bases else None,
        split=not all(manifest.whole for manifest in manifests.values()),
    )
    return recipe.compose(load_bases(config.bundles) if recipe.trains_bases else initial, outline)
