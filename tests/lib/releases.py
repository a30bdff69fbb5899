"""Bundles of trained models to release, good ones and spoiled ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.frames import pack_tensors, unpack_tensors
from export.cutting.split_model import SplitModel
from export.formats.bundles import write_bundles
from server_hub.storage.trained_run import TrainedRun
from tests.lib.runs import changed, finished_run


def trained_bundles(folder: Path, bundles: BundleIndex, seed: int) -> tuple[Path, SplitModel]:
    """Write bundles of a trained model; return their folder, and the model.

    Args:
        folder: folder to write.
        bundles: bundles of the job.
        seed: seed of the trained weights.
    """
    model = changed(bundles, seed)
    run = finished_run(folder / "run", bundles.folder, {None: model})
    trained = TrainedRun.read(run).trained(None, None, None, whole=True)
    write_bundles(folder / "bundles", trained, lambda line: None)
    return folder / "bundles", model


def spoiled(folder: Path) -> Path:
    """Change bundles so that no device answers their sample as they say; return the folder."""
    index = BundleIndex.read(folder)
    tiers = {}
    for tier, entry in index.tiers.items():
        manifest = index.manifest(tier)
        sample = unpack_tensors(index.blobs().read(manifest.sample))
        other = {**sample, "logits": sample["logits"] + np.float32(0.5)}
        tiers[tier] = replace(entry, manifest=_with_sample(index, manifest, pack_tensors(other)))
    replace(index, tiers=tiers).write()
    return folder


def _with_sample(index: BundleIndex, manifest: Manifest, data: bytes) -> str:
    name = index.blobs().write(data)
    blobs = {n: size for n, size in manifest.blobs.items() if n != manifest.sample}
    made = replace(manifest, sample=name, blobs={**blobs, name: len(data)})
    return index.blobs().write(made.to_bytes())
