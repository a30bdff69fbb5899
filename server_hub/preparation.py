"""Before a job: its method, and whether the bundles and the model go with it."""

from __future__ import annotations

from collections.abc import Mapping

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError
from export.split import SplitModel, statistics
from export.whole import load_bases
from server_hub.aggregation.layer_store import State
from server_hub.config import HubConfig
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.fleet import JobOutline
from server_hub.methods.method import Method
from server_hub.methods.registry import method_of


def compose(
    config: HubConfig, index: BundleIndex, manifests: Mapping[str, Manifest], initial: State
) -> Method:
    """The configuration's method.

    Args:
        config: of the hub.
        index: of the bundles.
        manifests: by tier.
        initial: what is trained of the model; of base networks the bundles have their own.

    Raises:
        ConfigError: the bundles are of base networks and the method is another, or the reverse.
    """
    bases = {manifest.bases for manifest in manifests.values()}
    mixes = config.method.name == "splitmix"
    if bases != {0} and not (mixes and len(bases) == 1):
        raise ConfigError(
            'the bundles are of base networks of one model; set name = "splitmix" in [method], and '
            "export all tiers together"
        )
    if mixes and bases == {0}:
        raise ConfigError(
            "Split-Mix trains base networks, and the bundles are of one model; export with "
            "bases = 8 in tiers.toml"
        )
    outline = JobOutline(
        config.rounds.count,
        config.local.epochs,
        optimizer=index.optimizer,
        mixing=config.mix.of(bases.pop()) if mixes else None,
        split=not all(manifest.whole for manifest in manifests.values()),
    )
    return method_of(config.method, load_bases(config.bundles) if mixes else initial, outline)


def check_bundles(
    method: Method, rounds: int, manifests: Mapping[str, Manifest], model: SplitModel
) -> None:
    """Raise :class:`ConfigError` unless the bundles have the graphs that a method needs.

    They must also hold what it will send them.
    """
    if method.mixing is not None:
        _check_mixing(method.mixing, manifests, model)
    stage = method.stage(1, rounds)
    needed = {"returned": "backward", "u_shaped": "finish", "fused": "fuse"}
    graph = needed.get(stage.activations)
    for tier, manifest in manifests.items():
        if graph is not None and graph not in manifest.graphs:
            raise ConfigError(
                f"{method.name} sends gradients back, and the bundle of {tier!r} has no "
                f"graphs for them; export with {stage.activations} = true in tiers.toml"
            )
        specs = manifest.exchanged(method.keeps_slots)
        state = method.aggregation.device_state(specs)
        for spec in specs:
            if state[spec.name].shape != spec.shape:
                raise ConfigError(
                    f"{spec.name} is {list(spec.shape)} in the bundle of {tier!r} and "
                    f"{list(state[spec.name].shape)} in the model; other ranks at a cut are "
                    "for splitft, else leave cut_rank out of tiers.toml"
                )


def _check_mixing(
    mixing: BaseAssignment, manifests: Mapping[str, Manifest], model: SplitModel
) -> None:
    """Every tier can train a base, and the trunk can train those that are cut."""
    for tier in mixing.budgets:
        if tier not in manifests:
            raise ConfigError(
                f"[mix] has a budget for a tier {tier!r}, and there is none; there are "
                f"{', '.join(manifests)}"
            )
    for tier, manifest in manifests.items():
        mixing.count(tier)
        if not manifest.whole and statistics(model.block[manifest.cut :]):
            raise ConfigError(
                f"the bases have batch norms above cut {manifest.cut} of tier {tier!r}, and the "
                "trunk trains all bases in one batch; use GroupNorm, or cut behind the last block"
            )
    if mixing.robustness and all("harden" not in m.graphs for m in manifests.values()):
        raise ConfigError(
            f"robustness is {mixing.robustness:g} in [mix], and no tier makes examples hard; "
            "export some with adversarial = true, or leave robustness out"
        )
