"""Folders of finished runs, without a hub that has trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from edge_sdk.bundle.index import BundleIndex
from export.bundles.model_source import model_of_bundles
from export.cutting.split_model import SplitModel
from server_hub.storage.run_folder import JobDescription, RoundRecord, RunFolder


def changed(bundles: BundleIndex, seed: int) -> SplitModel:
    """Return the bundles' model with other weights."""
    model = model_of_bundles(bundles.folder, None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.trained().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def finished_run(
    folder: Path,
    bundles: Path,
    models: Mapping[str | None, SplitModel],
    *,
    order: Sequence[int] = (),
    held_out: Path | None = None,
    rounds: int = 3,
) -> Path:
    """Write the folder of a run that has trained some models; return it.

    Args:
        folder: folder to write.
        bundles: bundles of the run.
        models: the models by what tells their files apart.
        order: numbers of base networks, best first.
        held_out: file of held-out examples.
        rounds: number of rounds.
    """
    index = BundleIndex.read(bundles)
    run = RunFolder(folder)
    run.save_job(JobDescription("0.0", "FedSplitX", bundles, index.model, held_out))
    accuracy = {tier: {"device_alone": 0.5} for tier in index.tiers}
    for number in range(1, rounds + 1):
        run.add(
            RoundRecord(
                number, 0.0, 0.0, 1, {}, None, None, None, 0, accuracy, {}, order=list(order)
            )
        )
    run.write()
    for name, model in models.items():
        tensors = {n: t.detach().numpy() for n, t in model.tensors().items()}
        run.save_model(tensors, name, rounds)
    return folder
