"""Stems, blocks and heads around the layers of transformers: one tensor in, one tensor out.

Everything that the layers need besides the activations (masks, positions, rotary angles) is
computed from the activations' shape, or from the activations themselves, so that a block can run
on another machine than the one before it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class TextStem(nn.Module):
    """Tokens (batch, positions) to activations (batch, positions, channels).

    Args:
        embedding: of the tokens.
        positions: table of learned positions, if the model has one.
        offset: row of the first position in that table; OPT's table begins with 2 unused rows.
        projection: from the embedding's width to that of the blocks.
        dropout: on the sum.
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
    """A layer of a causal decoder, with its mask.

    Texts are padded on the right, so a position sees padding only where it is padding itself:
    nothing besides the causal mask is needed.

    Args:
        layer: takes activations and ``attention_mask``.
        window: number of positions that a position sees, itself included; all if None.
        rotary: from activations and position ids to the angles that the layer's
            ``position_embeddings`` are. Each block has one of its own: ``functional_call`` does
            not give a module that is in two places its buffers back.
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
    """What is added to attention scores (1, 1, query, key): 0, or the dtype's lowest number."""
    distance_TT = positions_T.unsqueeze(1) - positions_T.unsqueeze(0)
    seen_TT = distance_TT >= 0
    if window is not None:
        seen_TT = seen_TT & (distance_TT < window)
    return _added(seen_TT, dtype).unsqueeze(0).unsqueeze(0)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return (~seen).to(dtype) * torch.finfo(dtype).min


class BertStem(nn.Module):
    """Tokens to activations; rows of padding become exactly zero.

    That is how the padding mask reaches the blocks, see :class:`BertBlock`. A row of a token is
    never zero throughout: it comes out of a layer norm.

    Args:
        embeddings: transformers' ``BertEmbeddings``.
        padding: the token that means padding, if there is one.
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
    """A layer of a bidirectional encoder that leaves out padding.

    Rows of activations that are zero throughout are padding: no position attends to them, and
    they are zero in the output again. So the mask travels with the activations, without a second
    tensor; codecs keep zeros.

    Args:
        layer: takes activations and ``attention_mask``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Activations of the same shape."""
        tokens_BT = (h_BTD != 0).any(-1)
        mask_B11T = _added(tokens_BT, h_BTD.dtype).unsqueeze(1).unsqueeze(1)
        out: Tensor = self.layer(h_BTD, mask_B11T)
        return out * tokens_BT.unsqueeze(-1).to(out.dtype)


class ResidualBlock(nn.Module):
    """A residual layer of ResNet, without adding in place: a step graph has no such operation.

    Args:
        layer: has ``layer``, ``shortcut`` and ``activation``.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Activations, of other channels and size where the layer changes them."""
        out: Tensor = self.layer.activation(self.layer.layer(h_BCHW) + self.layer.shortcut(h_BCHW))
        return out


class FirstPosition(nn.Module):
    """The activations of the first position, (batch, channels)."""

    def forward(self, h_BTD: Tensor) -> Tensor:
        """``h[:, 0]``."""
        return h_BTD[:, 0]


def in_order(**parts: nn.Module | None) -> nn.Sequential:
    """The parts that there are, one after the other, under their names."""
    return nn.Sequential(OrderedDict((n, m) for n, m in parts.items() if m is not None))
