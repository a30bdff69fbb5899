"""The method of a hub, composed from its settings and bundles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError
from export.bases.exported import load_bases
from export.cutting.split_model import SplitModel
from export.cutting.tied import tied_to_head
from server_hub.aggregation.update_bound import UpdateBound
from server_hub.methods.fleet import JobOutline, arrays
from server_hub.methods.method import Method
from server_hub.methods.registry import find, hub_methods
from server_hub.methods.settings import MethodConfig, SplitMixConfig


def compose(
    settings: MethodConfig,
    mix: SplitMixConfig,
    rounds: int,
    local_epochs: int,
    index: BundleIndex,
    manifests: Mapping[str, Manifest],
    model: SplitModel,
) -> Method:
    """The method that the settings name.

    Args:
        settings: name and options of the method.
        mix: settings for base networks.
        rounds: number of rounds of the job.
        local_epochs: epochs on the devices in a round.
        index: index of the bundles.
        manifests: manifest by tier.
        model: the hub's model, whose trained tensors the method starts from; bundles of base
            networks have their own.

    Raises:
        ConfigError: there is no such method; the method does not average with the rule; or the
            bundles are of base networks and the method trains a single model, or the reverse.
    """
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
    if settings.rule != "mean" and not recipe.takes_rule:
        raise ConfigError(
            f"{recipe.title} averages in a way of its own, and the rule {settings.rule!r} has no "
            'meaning there; set rule = "mean" in [method]'
        )
    outline = JobOutline(
        rounds,
        local_epochs,
        optimizer=index.optimizer,
        cut_rank=settings.cut_rank,
        assignment=mix.of(bases.pop()) if recipe.trains_bases else None,
        split=not all(manifest.whole for manifest in manifests.values()),
        rule=settings.rule,
        tied=tied_to_head(model),
    )
    start = load_bases(index.folder) if recipe.trains_bases else arrays(model.trained())
    return replace(recipe.compose(start, outline), bound=UpdateBound(settings.clip))
