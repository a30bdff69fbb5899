"""A small language model for the tests of the trunk, and texts for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from export.cutting.split_model import SplitModel
from tests.lib.models import AttentionBlock, TokenBlock

VOCABULARY = 11


class TokenStem(nn.Module):
    """Embeddings of tokens and of up to 9 positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(9, width)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embedding(x) + self.positions.weight[: x.shape[1]]
        return h


def language_model(seed: int = 0, width: int = 8) -> SplitModel:
    """Four causal blocks, a head at every depth; the last head reads the table of the stem."""
    torch.manual_seed(seed)
    stem = TokenStem(width)
    blocks = [kind(width) for kind in (AttentionBlock, TokenBlock, AttentionBlock, AttentionBlock)]
    out = nn.Linear(width, VOCABULARY, bias=False)
    out.weight = stem.embedding.weight
    model = SplitModel(stem, blocks, nn.Sequential(nn.LayerNorm(width), out), "tokens")
    model.add_heads((1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), VOCABULARY)
    for head in model.aux.values():
        nn.init.normal_(head.up.weight)  # type: ignore[union-attr, arg-type]
    return model


def some_texts(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens (rows, length), and labels of which some, but not all, are -1."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, VOCABULARY, (2, rows, length))
    y[rng.random(y.shape) < 0.4] = -1
    y[0, rng.integers(length)] = 0
    return torch.from_numpy(x), torch.from_numpy(y)
