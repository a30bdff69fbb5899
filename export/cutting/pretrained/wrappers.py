"""Stems, blocks and heads around the layers of transformers: each takes and returns one tensor.

Masks, positions and rotary angles are computed from the activations or from their shape. So a
block can run on another machine than the block before it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class TextStem(nn.Module):
    """Maps tokens (batch, positions) to activations (batch, positions, channels).

    Args:
        embedding: embedding of the tokens.
        positions: table of learned positions, if the model has one.
        offset: row of the first position in that table; OPT's table begins with 2 unused rows.
        projection: layer from the width of the embedding to the width of the blocks.
        dropout: dropout on the sum of embedding and position.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        positions: nn.Embedding | None = None,
        *,
        offset: int = 0,
        projection: nn.Module | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.offset = offset
        self.projection = projection
        self.dropout = dropout

    def forward(self, x_BT: Tensor) -> Tensor:
        """Activations of the first block."""
        h: Tensor = self.embedding(x_BT)
        if self.projection is not None:
            h = self.projection(h)
        if self.positions is not None:
            rows = torch.arange(x_BT.shape[1], device=x_BT.device) + self.offset
            h = h + nn.functional.embedding(rows, self.positions.weight)
        return h if self.dropout is None else self.dropout(h)


class DecoderBlock(nn.Module):
    """A layer of a causal decoder with its causal mask.

    Texts are padded on the right, so only padding attends to padding, and the causal mask is
    enough.

    Args:
        layer: layer that takes activations and ``attention_mask``.
        window: number of positions that a position attends to, itself included; None for all.
        rotary: computes the layer's ``position_embeddings`` from activations and position ids.
            Each block has its own copy: ``functional_call`` does not restore the buffers of a
            module that is registered twice.
    """

    def __init__(
        self, layer: nn.Module, window: int | None = None, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.window = window
        self.rotary = rotary

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Activations of the same shape."""
        positions = torch.arange(h_BTD.shape[1], device=h_BTD.device)
        mask = causal_mask(positions, h_BTD.dtype, self.window)
        if self.rotary is None:
            out = self.layer(h_BTD, attention_mask=mask)
        else:
            angles = self.rotary(h_BTD, position_ids=positions.unsqueeze(0))
            out = self.layer(h_BTD, attention_mask=mask, position_embeddings=angles)
        h: Tensor = out[0] if isinstance(out, tuple) else out
        return h


def causal_mask(positions_T: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Additive attention mask (1, 1, query, key): 0, or the lowest number of the dtype.

    Args:
        positions_T: positions of the tokens.
        dtype: dtype of the mask.
        window: number of positions that a position attends to, itself included; None for all.
    """
    distance_TT = positions_T.unsqueeze(1) - positions_T.unsqueeze(0)
    seen_TT = distance_TT >= 0
    if window is not None:
        seen_TT = seen_TT & (distance_TT < window)
    return _additive(seen_TT, dtype).unsqueeze(0).unsqueeze(0)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return (~seen).to(dtype) * torch.finfo(dtype).min


class BertStem(nn.Module):
    """Maps tokens to activations; activations of padding are exactly zero.

    Zeros carry the padding mask to the blocks, see :class:`BertBlock`. The activations of a token
    are never all zero, because they come out of a layer norm.

    Args:
        embeddings: ``BertEmbeddings`` of transformers.
        padding: id of the padding token, if the model has one.
    """

    def __init__(self, embeddings: Any, padding: int | None) -> None:
        super().__init__()
        self.embedding: nn.Embedding = embeddings.word_embeddings
        self.segments: nn.Embedding = embeddings.token_type_embeddings
        self.positions: nn.Embedding = embeddings.position_embeddings
        self.norm: nn.LayerNorm = embeddings.LayerNorm
        self.dropout: nn.Dropout = embeddings.dropout
        self.padding = padding

    def forward(self, x_BT: Tensor) -> Tensor:
        """Activations (batch, positions, channels); all tokens are of segment 0."""
        positions = torch.arange(x_BT.shape[1], device=x_BT.device)
        h: Tensor = self.embedding(x_BT) + self.segments.weight[0]
        h = self.dropout(self.norm(h + self.positions(positions)))
        if self.padding is not None:
            h = h * (x_BT != self.padding).unsqueeze(-1).to(h.dtype)
        return h


class BertBlock(nn.Module):
    """A layer of a bidirectional encoder that masks padding.

    A position whose activations are all zero is padding: no position attends to it, and its
    activations in the output are zero again. So the mask travels inside the activations; codecs
    keep zeros.

    Args:
        layer: layer that takes activations and an additive attention mask.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Activations of the same shape."""
        tokens_BT = (h_BTD != 0).any(-1)
        mask_B11T = _additive(tokens_BT, h_BTD.dtype).unsqueeze(1).unsqueeze(1)
        out: Tensor = self.layer(h_BTD, mask_B11T)
        return out * tokens_BT.unsqueeze(-1).to(out.dtype)


class ResidualBlock(nn.Module):
    """A residual layer of ResNet whose addition is not in place, as a step graph requires.

    Args:
        layer: layer of transformers with ``layer``, ``shortcut`` and ``activation``.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Activations (batch, channels, height, width); the layer may change all but the batch."""
        out: Tensor = self.layer.activation(self.layer.layer(h_BCHW) + self.layer.shortcut(h_BCHW))
        return out


class FirstPosition(nn.Module):
    """Selects the activations of the first position, (batch, channels)."""

    def forward(self, h_BTD: Tensor) -> Tensor:
        """``h[:, 0]``."""
        return h_BTD[:, 0]


def in_order(**parts: nn.Module | None) -> nn.Sequential:
    """A sequence of named parts; parts that are None are left out."""
    return nn.Sequential(OrderedDict((n, m) for n, m in parts.items() if m is not None))
