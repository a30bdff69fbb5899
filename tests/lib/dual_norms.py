"""Helpers for tests of base networks with dual norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from export.bases.dual_norms import DualNorm
from export.bundles.writer import Tier, export_bundles, make_steps
from export.cutting.split_model import ClientSegment, SplitModel
from export.steps.client_steps import ClientSteps
from export.steps.torch_runtime import TorchRuntime


def shaken(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Perturbed tensors, so that copies of norms differ; variances stay above zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t * (0.8 + 0.4 * torch.rand(t.shape, generator=generator))
        + (0 if n.endswith("running_var") else 0.1 * torch.randn(t.shape, generator=generator))
        for n, t in tensors.items()
    }


@contextmanager
def only(module: nn.Module, copied: str) -> Iterator[None]:
    """Replace every dual norm by one of its copies inside the context."""
    swapped = [
        (parent, key, child)
        for parent in list(module.modules())
        for key, child in parent.named_children()
        if isinstance(child, DualNorm)
    ]
    for parent, key, child in swapped:
        setattr(parent, key, getattr(child, copied))
    try:
        yield
    finally:
        for parent, key, child in swapped:
            setattr(parent, key, child)


def torch_runtime(
    model: SplitModel, tier: Tier, x: Tensor, classes: int, folder: Path
) -> tuple[TorchRuntime, ClientSteps]:
    """The steps of a tier in eager PyTorch."""
    tier = replace(tier, runtime="torch")
    index = export_bundles(
        model, {"t": tier}, folder, example=x, classes=classes, verified=False
    )  # fmt: skip
    steps = make_steps(ClientSegment(model, tier.cut), tier, x, classes, "sgd")
    return TorchRuntime(index.manifest("t"), steps), steps
