"""Small base networks for tests of mixtures, and their steps in eager PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples
from export.bases.exported import WholeBases, whole_bases
from export.bases.split_width import split_width
from export.bundles.writer import Tier, export_bundles, make_steps, segment_of
from export.cutting.split_model import SplitModel
from export.steps.client_steps import ClientSteps
from export.steps.torch_runtime import TorchRuntime

FEATURES, CLASSES, DEPTH, WIDTH = 6, 3, 2, 4
"""Size of inputs, number of classes, number of blocks, and units of a base in a layer."""


class Block(nn.Module):
    """Residual block: linear layer, GroupNorm with a group for each base, ReLU."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        return h + torch.relu(self.norm(self.linear(h)))


def wide(bases: int) -> SplitModel:
    """A model that can be split into ``bases`` base networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = WIDTH * bases
        blocks = [Block(width, bases) for _ in range(DEPTH)]
        return SplitModel(nn.Linear(FEATURES, width), blocks, nn.Linear(width, CLASSES))


def build_wide() -> SplitModel:
    """A model of four bases, with the import path ``tests.lib.mixture_models:build_wide``."""
    return wide(4)


def vectors(rows: int, seed: int = 0) -> Examples:
    """Noisy vectors from 0 to 1, around one point per class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows)
    points = np.random.default_rng(99).random((CLASSES, FEATURES))
    x = (points[y] + 0.1 * rng.standard_normal((rows, FEATURES))).clip(0, 1)
    return Examples(x.astype(np.float32), y)


@dataclass(frozen=True)
class Made:
    """An export for the runtime ``torch``, as in a simulation.

    Attributes:
        index: index of the bundles.
        bases: base networks.
        steps: steps by tier.
    """

    index: BundleIndex
    bases: WholeBases
    steps: Mapping[str, ClientSteps]

    def load(self, bundle: Bundle, threads: int = 1) -> TorchRuntime:
        """A runtime for a bundle."""
        return TorchRuntime(bundle.manifest, self.steps[bundle.manifest.tier])

    def runtime(self, tier: str) -> TorchRuntime:
        """A runtime for a tier."""
        return TorchRuntime(self.index.manifest(tier), self.steps[tier])

    def states(self, tier: str, seed: int = 0) -> list[dict[str, Array]]:
        """State of each base, with perturbed values."""
        rng = np.random.default_rng(seed)
        specs = self.index.manifest(tier).exchanged()
        stacked = self.bases.states
        return [
            {
                s.name: stacked[s.name][b]
                + 0.2 * rng.standard_normal(stacked[s.name][b].shape).astype(np.float32)
                for s in specs
            }
            for b in range(self.index.manifest(tier).bases)
        ]


@cache
def made(bases: int, dual: bool = True) -> Made:
    """Bundles of the tiers ``whole``, with adversarial examples, and ``cut``, without."""
    x = torch.from_numpy(vectors(8).x)
    split = split_width(wide(bases), bases, x)
    found = whole_bases(split.with_dual_norms() if dual else split, [1], x, CLASSES)
    tiers = {
        "whole": Tier(
            DEPTH, bases=bases, graphs=["adversarial_train"] if dual else [], runtime="torch"
        ),
        "cut": Tier(1, "fp16", bases=bases, runtime="torch"),
    }
    out = Path(tempfile.mkdtemp(prefix="cutlayer-mix-")) / "bundles"
    index = export_bundles(
        found.hub,
        tiers,
        out,
        example=x,
        classes=CLASSES,
        model_path="tests.lib.mixture_models:build_wide",
        extra={"mix": {"bases": bases, "dual_norms": dual, "shape": [FEATURES], "high": None}},
        bases=found,
        verified=False,
    )
    models = {"whole": found.whole, "cut": found.hub}
    steps = {
        name: make_steps(segment_of(models[name], tier), tier, x, CLASSES, "sgd")
        for name, tier in tiers.items()
    }
    return Made(replace(index, folder=out), found, steps)
