"""The correct graphs in which the mutation suite plants errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from export.bases.dual_norms import with_dual_norms
from export.bases.exported import without_trunk
from export.bundles.quantized import predict_int8, quantize_matrices
from export.bundles.writer import Tier, make_steps, segment_of
from export.cutting.split_model import SplitModel
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.step import Step
from tests.lib.models import CLASSES, MeanHead, build_batchnorm, conv_model, example, text_model

WORDS = 12


class Pools(nn.Module):
    """Convolutions with a stride and groups, max, average and adaptive pooling, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(6, 6, 3, stride=2, groups=2)
        self.most = nn.MaxPool2d(3, 2, 1)
        self.mean = nn.AvgPool2d(2, 1, 1)
        self.last = nn.AdaptiveAvgPool2d(2)

    def forward(self, h: Tensor) -> Tensor:
        """Activations (rows, 6, 2, 2)."""
        h = self.mean(self.most(torch.relu(self.conv(self.pad(h)))))
        return torch.nn.functional.hardswish(self.last(h))


class WordStem(nn.Module):
    """Token embeddings with a padding index, and positions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width, padding_idx=0)
        self.places = nn.Embedding(32, width)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (rows, positions, width)."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.embedding(x) + self.places(places) * torch.sigmoid(self.embedding(x)) ** 2


def pooled() -> SplitModel:
    """Pools between convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Pools(), nn.Conv2d(6, 6, 1)]
        return SplitModel(nn.Conv2d(1, 6, 3, padding=1), blocks, MeanHead(6, CLASSES))


def language() -> SplitModel:
    """A model of tokens with attention, whose head reads the table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [*text_model(words=WORDS).block]
        return SplitModel(WordStem(), blocks, nn.Linear(8, WORDS), "tokens")


def texts(rows: int = 8) -> Tensor:
    """Random texts of 6 tokens."""
    return torch.randint(WORDS, (rows, 6), generator=torch.Generator().manual_seed(0))


def images(rows: int = 8) -> Tensor:
    """Random images."""
    return example((1, 8, 8), rows)


@dataclass(frozen=True)
class Subject:
    """A model with the settings of a tier.

    Attributes:
        build: builds the model.
        inputs: inputs like those on devices.
        classes: number of classes.
        tier: settings of the tier.
        optimizer: optimizer of the training graphs.
    """

    build: Callable[[], SplitModel]
    inputs: Callable[[], Tensor]
    classes: int
    tier: Tier
    optimizer: str = "sgd"
    settings: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> ClientSteps:
        """The steps of the tier, from the same weights in every call."""
        model = self.build()
        if not self.tier.bases:
            model.add_heads(range(1, self.tier.cut + 1), self.inputs(), self.classes)
        return make_steps(
            segment_of(model, self.tier), self.tier, self.inputs(), self.classes, self.optimizer
        )

    def graphs(self, steps: ClientSteps) -> list[Step]:
        """All steps, with that of 8-bit inference for models without bases."""
        found = all_steps(steps)
        if not steps.bases:
            found.append(predict_int8(steps, quantize_matrices(steps, "onnx")))
        return found


def _bases() -> SplitModel:
    return without_trunk(with_dual_norms(conv_model()))


SUBJECTS: dict[str, Subject] = {
    "conv": Subject(conv_model, images, CLASSES, Tier(3, graphs=["backward"], distill=0.5)),
    "batchnorm": Subject(build_batchnorm, images, CLASSES, Tier(2, "fp16", graphs=["fuse"])),
    "pools": Subject(pooled, images, CLASSES, Tier(1), "adamw"),
    "text": Subject(
        lambda: text_model(words=WORDS), texts, CLASSES, Tier(2, graphs=["backward"]), "adamw"
    ),
    "language": Subject(language, texts, WORDS, Tier(2, "fp16", graphs=["finish"])),
    "bases": Subject(
        _bases, images, CLASSES, Tier(4, "fp16", bases=2, graphs=["adversarial_train"])
    ),
}
"""Subjects by name."""
