"""Small SplitModels that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from export.cutting.split_model import SplitModel

CLASSES = 10
IMAGE = (1, 8, 8)
TOKENS = (5, 6)
FEATURES = (6,)

BUILD = "tests.lib.models:build"
"""The import path of :func:`build`."""

TIERS_TOML = "classes = 10\ninput_shape = [1, 8, 8]\n[tiers.small]\ncut = 1\n"
"""The smallest ``tiers.toml`` for :func:`build`."""


class ConvBlock(nn.Module):
    """Residual: convolution, GroupNorm, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        return h + torch.relu(self.norm(self.conv(h)))


class TokenBlock(nn.Module):
    """Residual: LayerNorm, Linear, GELU, Linear; for (B, T, C) and (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        grown = nn.functional.gelu(self.wide(self.norm(h)))
        result: Tensor = h + self.narrow(grown)
        return result


class AttentionBlock(nn.Module):
    """Residual: causal self-attention with two heads, for (B, T, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        rows, length, width = h.shape
        qkv = self.qkv(self.norm(h)).reshape(rows, length, 3, 2, width // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = h + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return result


class MeanHead(nn.Module):
    """Mean over positions, then Linear."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        if h.dim() == 4:
            h = h.mean((2, 3))
        elif h.dim() == 3:
            h = h.mean(1)
        logits: Tensor = self.out(h)
        return logits


def conv_model(seed: int = 0, width: int = 6) -> SplitModel:
    """Four convolutional blocks with GroupNorm, the third with a stride; for :data:`IMAGE`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        down = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(2, width), nn.ReLU()
        )
        blocks = [ConvBlock(width), ConvBlock(width), down, ConvBlock(width)]
        stem = nn.Conv2d(IMAGE[0], width, 3, padding=1)
        return SplitModel(stem, blocks, MeanHead(width, CLASSES))


def token_model(seed: int = 0, width: int = 8) -> SplitModel:
    """Three LayerNorm and GELU blocks for :data:`TOKENS`, and for :data:`FEATURES` as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [TokenBlock(width) for _ in range(3)]
        return SplitModel(nn.Linear(FEATURES[0], width), blocks, MeanHead(width, CLASSES))


def text_model(seed: int = 0, width: int = 8, words: int = 12) -> SplitModel:
    """Attention between LayerNorm and GELU blocks, on embeddings of integers below ``words``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [TokenBlock(width), AttentionBlock(width), TokenBlock(width)]
        return SplitModel(nn.Embedding(words, width), blocks, MeanHead(width, CLASSES))


def build() -> SplitModel:
    """The model of the ``bundles`` fixture, by the import path ``tests.lib.models:build``."""
    return conv_model()


class NormBlock(nn.Module):
    """Residual: convolution, BatchNorm, ReLU in place, dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = h + self.drop(self.relu(self.norm(self.conv(h))))
        return result


def build_batchnorm() -> SplitModel:
    """Four blocks with BatchNorm and dropout behind a frozen stem; for :data:`IMAGE`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(IMAGE[0], 8, 3, padding=1), nn.MaxPool2d(2))
        stem.requires_grad_(False)
        return SplitModel(stem, [NormBlock(8) for _ in range(4)], MeanHead(8, CLASSES))


def example(shape: tuple[int, ...], rows: int = 8, seed: int = 0) -> Tensor:
    """Random inputs."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def open_bundle(index: BundleIndex, tier: str) -> Bundle:
    """A tier's bundle, read from the folder that it was exported to."""
    manifest, blobs = index.manifest(tier), index.blobs()
    return Bundle.open(manifest, blobs.read)
