"""Codecs: how activations are packed in the step graph, and unpacked by the hub in torch.

A codec is a pair of pure functions. ``pack`` is traced into the step graphs, so what a graph puts
out are the tensors that travel; ``unpack`` runs on the hub's device. This is the one place for
codecs: a new one is a class here and an entry in :data:`CODECS`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import TensorSpec
from export.errors import ExportError


class Codec(Protocol):
    """Packs activations (batch, ...) into named tensors and back."""

    name: str

    def pack(self, h: Tensor) -> dict[str, Tensor]:
        """Packed tensors by name. Must not carry a gradient into ``h``."""

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Activations in float32, on the device of the parts."""

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """What travels for activations of shape ``(batch, *shape)``."""

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """Largest error of ``unpack(pack(h))`` in exact arithmetic, broadcastable to ``h``."""


def channel_axis(dims: int) -> int:
    """Axis of the channels: 1 for (B, C) and (B, C, H, W), last for (B, T, C)."""
    return 2 if dims == 3 else 1


def _per_channel(scale: Tensor, dims: int) -> Tensor:
    shape = [1] * dims
    shape[channel_axis(dims)] = -1
    return scale.reshape(shape)


class Int8PerChannel:
    """8-bit integers with one scale per channel of the batch: ``h ~ q * scale``.

    ``scale = max|h| / 127`` over the batch and positions of a channel. A channel that is zero
    throughout has the smallest scale there is, and codes of zero.
    """

    name = "int8"
    _TINY = 1e-12

    def pack(self, h: Tensor) -> dict[str, Tensor]:
        h = h.detach()
        axis = channel_axis(h.dim())
        others = [d for d in range(h.dim()) if d != axis]
        scale = h.abs().amax(others).clamp(min=self._TINY) / 127
        q = torch.round(h / _per_channel(scale, h.dim())).clamp(-127, 127).to(torch.int8)
        return {"h.q": q, "h.scale": scale}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        q = parts["h.q"]
        return q.to(torch.float32) * _per_channel(parts["h.scale"], q.dim())

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        channels = shape[channel_axis(len(shape) + 1) - 1]
        return (
            TensorSpec("h.q", "int8", ("batch", *shape)),
            TensorSpec("h.scale", "float32", (channels,)),
        )

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return _per_channel(parts["h.scale"], parts["h.q"].dim()) / 2


class Fp16:
    """Half precision; values beyond its range are clamped to it."""

    name = "fp16"
    _MAX = 65504.0

    def pack(self, h: Tensor) -> dict[str, Tensor]:
        return {"h": h.detach().clamp(-self._MAX, self._MAX).to(torch.float16)}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32)

    def specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec("h", "float16", ("batch", *shape)),)

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32).abs() * 2**-11 + 2**-25


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8PerChannel(), Fp16())}


def get_codec(name: str) -> Codec:
    """The codec called ``name``. Raises :class:`ExportError`."""
    if name not in CODECS:
        raise ExportError(f"unknown codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]
