"""The measured segments, one for each family of models that devices train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.adapters_lora.lora import Lora, add_lora
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import SplitModel


@dataclass(frozen=True)
class Family:
    """A model with a cut, and a batch for it.

    Attributes:
        build: builds the model, with the same weights every time.
        cut: cut layer.
        x: input batch (rows, ...).
        classes: number of classes; for texts, the size of the vocabulary.
        optimizer: optimizer of the step.
        group: ``transformer`` or ``convolution``.
    """

    build: Callable[[], SplitModel]
    cut: int
    x: Tensor
    classes: int
    optimizer: str
    group: str

    def model(self) -> SplitModel:
        """Build the model with an auxiliary head at the cut."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        model.add_heads([self.cut], self.x, self.classes)
        return model

    def labels(self) -> Tensor:
        """Return random labels for ``x``."""
        text = not self.x.is_floating_point()
        shape = self.x.shape if text else self.x.shape[:1]
        return torch.randint(self.classes, shape, generator=torch.Generator().manual_seed(1))


class _ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, h: Tensor) -> Tensor:
        result: Tensor = h + torch.relu(self.norm(self.conv(h)))
        return result


def _conv_groupnorm() -> SplitModel:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    stem = nn.Conv2d(3, 32, 3, padding=1)
    return SplitModel(stem, [_ConvBlock(32) for _ in range(5)], head)


def _mobilenet() -> SplitModel:
    from transformers import MobileNetV2Config

    return from_transformers(MobileNetV2Config(num_labels=10, image_size=64))


def _vit() -> SplitModel:
    from transformers import ViTConfig

    return from_transformers(
        ViTConfig(
            hidden_size=192,
            num_hidden_layers=5,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=32,
            patch_size=4,
            num_labels=10,
        )
    )


def _gpt2(width: int, heads: int, words: int) -> SplitModel:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=words,
        n_positions=256,
        n_embd=width,
        n_layer=3,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return add_lora(from_transformers(config), Lora(rank=8, targets=["c_attn"]))


def _llama() -> SplitModel:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    return add_lora(from_transformers(config), Lora(rank=8, targets=["q_proj", "v_proj"]))


def _images(rows: int, size: int) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


def _texts(rows: int, length: int, words: int) -> Tensor:
    return torch.randint(words, (rows, length), generator=torch.Generator().manual_seed(0))


FAMILIES = {
    "conv-groupnorm": Family(_conv_groupnorm, 4, _images(32, 32), 10, "sgd", "convolution"),
    "mobilenet-v2": Family(_mobilenet, 4, _images(16, 64), 10, "sgd", "convolution"),
    "vit": Family(_vit, 4, _images(16, 32), 10, "adamw", "transformer"),
    "gpt2-lora-256": Family(
        lambda: _gpt2(256, 8, 4096), 2, _texts(8, 64, 4096), 4096, "adamw", "transformer"
    ),
    "gpt2-lora-768": Family(
        lambda: _gpt2(768, 12, 50257), 2, _texts(4, 64, 50257), 50257, "adamw", "transformer"
    ),
    "llama-lora": Family(_llama, 2, _texts(8, 64, 4096), 4096, "adamw", "transformer"),
}
