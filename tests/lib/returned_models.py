"""Models for tests of returned gradients, cut after the second block."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from export.adapters_lora.lora import Lora, add_lora
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import ClientSegment, SplitModel
from export.packing.codecs import Codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from tests.lib.models import (
    CLASSES,
    IMAGE,
    ConvBlock,
    MeanHead,
    build_batchnorm,
    conv_model,
    example,
)

HYPER = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0},
    "adamw": {
        "lr": 0.01,
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "max_norm": 0.0,
    },
}


WORDS = 20


CUT = 2


class DropBlock(nn.Module):
    """A convolutional block with dropout behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = ConvBlock(width)
        self.drop = nn.Dropout(0.4)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = self.drop(self.inner(h))
        return result


class DropHead(MeanHead):
    """A head with dropout and a batch norm of its own."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return super().forward(self.drop(self.norm(h)))


def dropout_model() -> SplitModel:
    """Dropouts before the cut, with a head between them that has dropout too; a trunk without."""
    torch.manual_seed(0)
    blocks = [DropBlock(6), DropBlock(6), ConvBlock(6)]
    model = SplitModel(nn.Conv2d(1, 6, 3, padding=1), blocks, MeanHead(6, CLASSES))
    model.aux["1"] = DropHead(6, CLASSES)
    return model


def batchnorm_model() -> SplitModel:
    """Batch norms and frozen layers before the cut; a trunk without dropout."""
    model = build_batchnorm()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def lora_model() -> SplitModel:
    """A small GPT-2 with adapters."""
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=WORDS, n_positions=16, bos_token_id=1,
        eos_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = from_transformers(config)
    add_lora(model, Lora(rank=3), "gpt2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # starts at zero, where A has no gradient
                parameter.normal_(0, 0.1)
    return model


def words(rows: int, seed: int = 0) -> Tensor:
    """Return random token ids."""
    return torch.randint(WORDS, (rows, 6), generator=torch.Generator().manual_seed(seed))


def images(rows: int, seed: int = 0) -> Tensor:
    """Return small random images."""
    return example(IMAGE, rows, seed)


MODELS: dict[str, Any] = {
    "groupnorm": (conv_model, images, CLASSES),
    "batchnorm": (batchnorm_model, images, CLASSES),
    "dropout": (dropout_model, images, CLASSES),
    "lora": (lora_model, words, WORDS),
}


def steps_of(kind: str, codec: Codec, optimizer: str) -> tuple[SplitModel, ClientSteps]:
    """A model cut after its second block, with heads at both cuts."""
    build, draw, classes = MODELS[kind]
    model = build()
    model.add_heads([1, CUT], draw(8), classes)
    segment = ClientSegment(model, CUT)
    limits = {"batch": 8} | ({"seq": 6} if kind == "lora" else {})
    return model, ClientSteps(
        segment, get_optimizer(optimizer), codec, draw(8), classes, limits, graphs=["backward"]
    )
