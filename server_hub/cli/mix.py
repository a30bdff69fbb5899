"""``cutlayer mix``: writes bundles that hold all trained base networks of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import State
from server_hub.reports.table import Table


def mix(
    run: Annotated[Path, typer.Argument(help="Run folder of a hub with Split-Mix.")],
    bundles: Annotated[Path, typer.Option(help="Bundle folder of the hub.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Put all trained bases of a run into the bundles, best first, to ship them with an app."""
    index = bundle_bases(run, bundles, out, overwrite)
    manifests = {tier: index.manifest(tier) for tier in index.tiers}
    rows = [
        [tier, str(len(m.base_states)), f"{sum(m.blobs.values()) / 1e3:,.0f}"]
        for tier, m in manifests.items()
    ]
    console = Console(highlight=False, markup=False)
    console.print(Table("Bundles of trained bases", ["tier", "bases", "kB"], rows).rich())
    console.print(
        f"written to {out}; edge_sdk.Mixture.open reads it, cutlayer bundle sign signs it"
    )


def bundle_bases(run: Path, bundles: Path, out: Path, overwrite: bool = False) -> BundleIndex:
    """Write bundles that hold the trained bases of a run.

    Args:
        run: run folder of the hub.
        bundles: bundle folder of the hub.
        out: folder to write; it must not exist, unless ``overwrite`` is set.
        overwrite: whether to replace an earlier export at ``out``.

    Returns:
        The index of the new bundles.

    Raises:
        ConfigError: ``run`` holds no run of Split-Mix, or its bases do not fit the bundles.
        ExportError: ``out`` exists; it is unchanged.
    """
    from export.out_folder import check_out, folder_for, put

    check_out(out, overwrite)
    index = BundleIndex.read(bundles)
    states = _trained(run)
    with folder_for(out) as folder:
        blobs = BlobStore(folder / "blobs")
        entries = {}
        for tier, entry in index.tiers.items():
            manifest = _with_bases(index, tier, states, blobs)
            entries[tier] = TierEntry(entry.cut, entry.codec, blobs.write(manifest.to_bytes()))
        replace(index, folder=folder, tiers=entries).write()
        put(folder, out)
    return replace(index, folder=out, tiers=entries)


def _trained(run: Path) -> list[State]:
    """Read the trained bases of a run, best first: tensors by name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from server_hub.storage.run_folder import METRICS, model_file, read_records

    if not (run / METRICS).is_file():
        raise ConfigError(f"there is no run in {run}: it has no {METRICS}")
    records = read_records(run)
    if not records or not records[-1].order:
        raise ConfigError(f"the run in {run} has no base networks; it was not one of Split-Mix")
    states = []
    for base in records[-1].order:
        path = run / model_file(f"base-{base}")
        try:
            states.append(load(path.read_bytes()))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read the base {path}: {error}") from error
    return states


def _with_bases(index: BundleIndex, tier: str, states: list[State], blobs: BlobStore) -> Manifest:
    """Write the blobs of a tier with the states of trained bases; return the new manifest."""
    manifest = index.manifest(tier)
    if manifest.bases != len(states):
        raise ConfigError(
            f"the run has {len(states)} bases, and the bundle of tier {tier!r} is for "
            f"{manifest.bases}; give the bundles that the hub had"
        )
    kept = [name for name in manifest.blobs if name != manifest.initial_state]
    for name in kept:
        blobs.write(index.blobs().read(name))
    sizes = {name: manifest.blobs[name] for name in kept}
    names = []
    for state in states:
        own = {}
        for spec in manifest.exchanged():
            if spec.name not in state or state[spec.name].shape != spec.shape:
                raise ConfigError(
                    f"the run's bases have no {spec.name} as the bundle of tier {tier!r} has; give "
                    "the bundles that the hub had"
                )
            own[spec.name] = state[spec.name]
        data = pack_tensors(own)
        names.append(blobs.write(data))
        sizes[names[-1]] = len(data)
    if len(set(names)) < len(names):
        raise BundleError("two bases are the same; the run has not trained them")
    return replace(manifest, initial_state=names[0], base_states=tuple(names), blobs=sizes)
