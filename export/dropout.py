"""Dropout with a seed that is an input: the same graph draws another mask for every seed.

A graph of standard operators has no random numbers, so the mask is arithmetic: element ``i`` of
the ``n``-th dropout of a step has the key ``i + C n``, and three rounds of ``x -> (x + k)^3 mod p``
with keys from the seed turn it into a number that is uniform in ``0..p-1`` for all that dropout
needs (the rounds of the block cipher MiMC, https://eprint.iacr.org/2016/492; here they need not be
secret). A mask has the distribution of ``torch.nn.functional.dropout``, not its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRIME = 2_147_483_579
"""The largest prime below 2^31 with ``p mod 3 = 2``: there ``x -> x^3`` is a permutation."""

_ROUND_KEYS = (0, 1_103_515_245, 824_287_391)
_STRIDE = 1_299_709_357


class SeededDropout(TorchFunctionMode):
    """While active, every dropout takes its mask from ``seed``.

    Args:
        seed: int64 scalar, ``0 <= seed < PRIME``.

    Attributes:
        calls: dropouts that took a mask so far.
    """

    def __init__(self, seed: Tensor) -> None:
        super().__init__()
        self.seed = seed
        self.calls = 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        mine: dict[Any, Callable[..., Any]] = {
            F.dropout: self._dropout,
            torch.dropout: self._dropout,  # positional, as nn.functional calls it
            F.dropout1d: self._signals,
            F.dropout2d: self._channels,
            F.dropout3d: self._channels,
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head_attention,
        }
        return mine.get(function, function)(*args, **(kwargs or {}))

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        return input * self._kept(input.shape, p, input)

    def _channels(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        shape = (*input.shape[:2], *[1] * (input.dim() - 2))
        return input * self._kept(shape, p, input)

    def _signals(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """For ``dropout1d``, to which two dimensions are (channels, length) without a batch."""
        if input.dim() == 3:
            return self._channels(input, p, training)
        return self._channels(input.unsqueeze(0), p, training).squeeze(0)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention as written in torch's documentation, for the sake of its dropout."""
        if dropout_p == 0:
            result: Tensor = torch._C._nn.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return result
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            rows = torch.arange(query.shape[-2], device=query.device).unsqueeze(1)
            attn_mask = torch.arange(key.shape[-2], device=query.device).unsqueeze(0) <= rows
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._dropout(torch.softmax(scores, -1), dropout_p) @ value

    def _multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        """The function of ``nn.MultiheadAttention``: what it calls does not reach the mode."""
        with patch.multiple(F, dropout=self._dropout, scaled_dot_product_attention=self._attention):
            return F.multi_head_attention_forward(*args, **kwargs)

    def _kept(self, shape: Any, p: float, like: Tensor) -> Tensor:
        """What to multiply by: 0 with probability ``p``, else ``1 / (1 - p)``."""
        count = 1
        for n in shape:
            count = count * n
        x = torch.arange(count, device=like.device).reshape(shape)
        x = x + (_STRIDE * self.calls) % PRIME
        self.calls += 1
        for key in _ROUND_KEYS:
            x = torch.remainder(x + (self.seed + key), PRIME)
            x = torch.remainder(torch.remainder(x * x, PRIME) * x, PRIME)
        return (x >= round(p * PRIME)).to(like.dtype) * (1 / (1 - p) if p < 1 else 0.0)
