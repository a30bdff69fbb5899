"""Dropout whose mask is a function of a seed, which is an input of the graph.

A graph of standard operators has no random numbers, so the mask is computed by integer arithmetic.
Element ``i`` of the ``n``-th dropout of a step has the key ``i + C n``. Three rounds of
``x -> (x + k)^3 mod p`` with keys from the seed map it to a number that is close enough to uniform
in ``0..p-1`` for dropout. These are the rounds of the block cipher MiMC
(https://eprint.iacr.org/2016/492); secrecy is not needed here. A mask has the distribution of
``torch.nn.functional.dropout``, not its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRIME = 2_147_483_579
"""Largest prime ``p`` below 2^31 with ``p mod 3 = 2``, for which ``x -> x^3`` is a permutation."""

_ROUND_KEYS = (0, 1_103_515_245, 824_287_391)
_STRIDE = 1_299_709_357

_ATTENTION = F.scaled_dot_product_attention
"""Torch's attention. The name in ``F`` is another function inside of ``nn.MultiheadAttention``."""

_CHOICE = PRIME - 1
"""Key of choices, which are drawn once per step: the last key, far from those of masks."""


class SeededDropout(TorchFunctionMode):
    """While active, every dropout takes its mask from ``seed``.

    Args:
        seed: int64 scalar, ``0 <= seed < PRIME``.
        after: number of masks that others have drawn from the seed, which are not drawn again.

    Attributes:
        calls: number of masks and choices drawn so far, those of others included.
    """

    def __init__(self, seed: Tensor, after: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.calls = after
        self._choices: dict[tuple[float, ...], Tensor] = {}

    @staticmethod
    def active() -> SeededDropout | None:
        """The innermost active mode of this thread; None if there is none."""
        return _ACTIVE.get()

    def __enter__(self) -> SeededDropout:
        self._outer = _ACTIVE.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._outer)

    def choice(self, values: Sequence[float]) -> Tensor:
        """Draw one of ``values`` with equal probability, a float32 scalar.

        The choice depends on the seed only: calls with the same values return the same one, and
        the masks of dropouts do not change.
        """
        known = tuple(values)
        if known not in self._choices:
            key = torch.full((), _CHOICE, dtype=torch.int64, device=self.seed.device)
            index = torch.remainder(self._uniform(key), len(known))
            chosen = [(index == i).to(torch.float32) * value for i, value in enumerate(known)]
            self._choices[known] = torch.stack(chosen).sum()
            self.calls += 1
        return self._choices[known]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        mine: dict[Any, Callable[..., Any]] = {
            F.dropout: self._dropout,
            torch.dropout: self._dropout,  # nn.functional passes its arguments by position
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
        """``dropout1d``, which reads two dimensions as (channels, length) without a batch."""
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
        """Attention as torch documents it, in operations whose dropout this mode computes."""
        if dropout_p == 0:
            result: Tensor = _ATTENTION(
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
        """The function of ``nn.MultiheadAttention``, whose inner calls bypass the mode."""
        with patch.multiple(F, dropout=self._dropout, scaled_dot_product_attention=self._attention):
            return F.multi_head_attention_forward(*args, **kwargs)

    def _kept(self, shape: Any, p: float, like: Tensor) -> Tensor:
        """Mask of a shape: 0 with probability ``p``, else ``1 / (1 - p)``."""
        count = 1
        for n in shape:
            count = count * n
        x = torch.arange(count, device=like.device).reshape(shape)
        x = x + (_STRIDE * (self.calls - len(self._choices))) % PRIME
        self.calls += 1
        x = self._uniform(x)
        return (x >= round(p * PRIME)).to(like.dtype) * (1 / (1 - p) if p < 1 else 0.0)

    def _uniform(self, x: Tensor) -> Tensor:
        """Pseudorandom numbers in ``0..PRIME-1`` for the keys ``x``."""
        for key in _ROUND_KEYS:
            x = torch.remainder(x + (self.seed + key), PRIME)
            x = torch.remainder(torch.remainder(x * x, PRIME) * x, PRIME)
        return x


_ACTIVE: ContextVar[SeededDropout | None] = ContextVar("active", default=None)
