"""Random numbers that are a function of a seed, which is an input of the graph.

A graph of standard operators has no random numbers, so they are computed by integer arithmetic.
Element ``i`` of the ``n``-th draw of a step has the key ``i + C n``. Three rounds of
``x -> (x + k)^3 mod p`` with keys from the seed map it to a number that is close enough to uniform
in ``0..p-1`` for dropout. These are the rounds of the block cipher MiMC
(https://eprint.iacr.org/2016/492); secrecy is not needed here. Draws have the distribution of
torch's, not their bits.

Dropout, uniform, Bernoulli and normal numbers are seeded in this way; :func:`unseeded` finds all
others, which are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from export.errors import ExportError
from export.torch_internals import OperatorMode, schema

PRIME = 2_147_483_579
"""Largest prime ``p`` below 2^31 with ``p mod 3 = 2``, for which ``x -> x^3`` is a permutation."""

_ROUND_KEYS = (0, 1_103_515_245, 824_287_391)
_STRIDE = 1_299_709_357

_ATTENTION = F.scaled_dot_product_attention
"""Torch's attention. The name in ``F`` is another function inside of ``nn.MultiheadAttention``."""

_LOWEST = -1.7580993408473766
"""Limit of SELU towards minus infinity, to which alpha dropout sets what it drops."""

_CHOICE = PRIME - 1
"""Key of choices, which are drawn once per step: the last key, far from those of masks."""


class SeededDropout(TorchFunctionMode):
    """While active, dropouts, uniform, Bernoulli and normal numbers are drawn from ``seed``.

    Args:
        seed: int64 scalar, ``0 <= seed < PRIME``.
        after: number of draws that others have made from the seed, which are not repeated.

    Attributes:
        calls: number of draws and choices so far, those of others included.
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
            F.alpha_dropout: self._alpha_dropout,
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head_attention,
            torch.rand: self._rand,
            torch.rand_like: self._rand_like,
            Tensor.uniform_: self._uniform_,
            torch.bernoulli: self._bernoulli,
            Tensor.bernoulli: self._bernoulli,
            Tensor.bernoulli_: self._bernoulli_,
            torch.randn: self._randn,
            torch.randn_like: self._randn_like,
            Tensor.normal_: self._normal_,
        }
        kwargs = kwargs or {}
        if kwargs.get("out") is not None:  # not drawn from the seed, and so refused
            return function(*args, **kwargs)
        return mine.get(function, function)(*args, **kwargs)

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

    def _alpha_dropout(
        self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        """Dropout to SELU's lowest value, which keeps mean 0 and variance 1.

        Formula of Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017, section 2.
        """
        if not training or p == 0:
            return input
        kept = (self._draw(input.shape, input.device) >= round(p * PRIME)).to(input.dtype)
        if p == 1:
            return input * kept
        slope = 1 / math.sqrt((1 - p) * (1 + p * _LOWEST**2))
        return slope * (input * kept + _LOWEST * (1 - kept)) - slope * _LOWEST * p

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

    def _rand(
        self, *sizes: Any, dtype: torch.dtype | None = None, device: Any = None, **named: Any
    ) -> Tensor:
        shape = named.get("size", sizes[0] if _is_shape(sizes) else sizes)
        drawn = self._draw(shape, device or self.seed.device)
        return _fractions(drawn, dtype or torch.get_default_dtype())

    def _rand_like(self, input: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return _fractions(self._draw(input.shape, input.device), dtype or input.dtype)

    def _uniform_(self, input: Tensor, *bounds: float, **named: Any) -> Tensor:
        low, high = [*bounds, 0.0, 1.0][:2] if len(bounds) != 1 else (bounds[0], 1.0)
        low, high = named.get("from", low), named.get("to", high)
        return input.copy_(self._rand_like(input) * (high - low) + low)

    def _bernoulli(self, input: Tensor, p: float | None = None, **_: Any) -> Tensor:
        """0 or 1, with the probabilities ``p``, or else those in ``input``."""
        drawn = self._draw(input.shape, input.device)
        if p is not None:
            return (drawn < round(p * PRIME)).to(input.dtype)
        return (_fractions(drawn, input.dtype) < input).to(input.dtype)

    def _bernoulli_(self, input: Tensor, p: Tensor | float = 0.5, **_: Any) -> Tensor:
        if isinstance(p, Tensor):
            return input.copy_(self._bernoulli(p.expand(input.shape)))
        return input.copy_(self._bernoulli(input, p))

    def _randn(
        self, *sizes: Any, dtype: torch.dtype | None = None, device: Any = None, **named: Any
    ) -> Tensor:
        shape = named.get("size", sizes[0] if _is_shape(sizes) else sizes)
        return self._normal(shape, device or self.seed.device, dtype or torch.get_default_dtype())

    def _randn_like(self, input: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return self._normal(input.shape, input.device, dtype or input.dtype)

    def _normal_(self, input: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
        return input.copy_(self._randn_like(input) * std + mean)

    def _normal(self, shape: Any, device: Any, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers by the transformation of Box and Muller (1958)."""
        size, angle = (_fractions(self._draw(shape, device), dtype) for _ in range(2))
        return torch.sqrt(-2 * torch.log(1 - size)) * torch.cos(2 * math.pi * angle)

    def _kept(self, shape: Any, p: float, like: Tensor) -> Tensor:
        """Mask of a shape: 0 with probability ``p``, else ``1 / (1 - p)``."""
        x = self._draw(shape, like.device)
        return (x >= round(p * PRIME)).to(like.dtype) * (1 / (1 - p) if p < 1 else 0.0)

    def _draw(self, shape: Any, device: Any) -> Tensor:
        """New numbers in ``0..PRIME-1`` of a shape."""
        count = 1
        for n in shape:
            count = count * n
        x = torch.arange(count, device=device).reshape(shape)
        x = x + (_STRIDE * (self.calls - len(self._choices))) % PRIME
        self.calls += 1
        return self._uniform(x)

    def _uniform(self, x: Tensor) -> Tensor:
        """Pseudorandom numbers in ``0..PRIME-1`` for the keys ``x``."""
        for key in _ROUND_KEYS:
            x = torch.remainder(x + (self.seed + key), PRIME)
            x = torch.remainder(torch.remainder(x * x, PRIME) * x, PRIME)
        return x


def _is_shape(sizes: tuple[Any, ...]) -> bool:
    """Whether sizes are given as one list, instead of one by one."""
    return len(sizes) == 1 and isinstance(sizes[0], list | tuple)


def _fractions(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1) that are multiples of 2^-24, so that float32 and float64 agree."""
    return (drawn - torch.remainder(drawn, 128)).to(dtype) * 2.0**-31


@contextmanager
def unseeded() -> Iterator[None]:
    """Refuse operators with random numbers of their own inside the block."""
    with _Refusing():  # type: ignore[no-untyped-call]
        yield


def check_operator(operator: Any) -> None:
    """Raise :class:`ExportError` for an operator with random numbers of its own.

    Attention without dropout has the mark of random operators, and is allowed.
    """
    marked = torch.Tag.nondeterministic_seeded in operator.tags
    if marked and "attention" not in schema(operator).name:
        name = schema(operator).name.replace("::", ".")
        raise ExportError(
            f"it draws random numbers with {name}, which a device cannot repeat from the step's "
            "seed; in training use dropout, torch.rand, uniform_, bernoulli or randn, which are "
            "drawn from it, and nothing random in evaluation"
        )


class _Refusing(OperatorMode):  # type: ignore[no-untyped-call]
    """Refuses random operators, wherever they are called."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        check_operator(func)
        return func(*args, **(kwargs or {}))


_ACTIVE: ContextVar[SeededDropout | None] = ContextVar("active", default=None)
