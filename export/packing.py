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

Shape = tuple[int | str, ...]


class Codec(Protocol):
    """Packs activations (batch, ...) into named tensors and back.

    What is packed says by itself how to unpack it; only packing needs to know the channels.
    """

    name: str

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Packed tensors by name. Must not carry a gradient into ``h``."""

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Activations in float32, on the device of the parts."""

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """What travels for activations of this shape, the batch included."""

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """Largest error of ``unpack(pack(h))`` in exact arithmetic, broadcastable to ``h``."""


class Int8PerChannel:
    """8-bit integers with one scale per channel of the batch: ``h ~ q * scale``.

    ``scale = max|h| / 127`` over the batch and positions of a channel, in a shape that broadcasts.
    A channel that is zero throughout has the smallest scale there is, and codes of zero.
    """

    name = "int8"
    _TINY = 1e-12

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        h = h.detach()
        others = [d for d in range(h.dim()) if d != channel_axis]
        scale = h.abs().amax(others, keepdim=True).clamp(min=self._TINY) / 127
        q = torch.round(h / scale).clamp(-127, 127).to(torch.int8)
        return {"h.q": q, "h.scale": scale}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h.q"].to(torch.float32) * parts["h.scale"]

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        scales = tuple(n if i == channel_axis else 1 for i, n in enumerate(shape))
        return TensorSpec("h.q", "int8", shape), TensorSpec("h.scale", "float32", scales)

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h.scale"] / 2


class Fp16:
    """Half precision; values beyond its range are clamped to it."""

    name = "fp16"
    _MAX = 65504.0

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        return {"h": h.detach().clamp(-self._MAX, self._MAX).to(torch.float16)}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32)

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("h", "float16", shape),)

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32).abs() * 2**-11 + 2**-25


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8PerChannel(), Fp16())}


def get_codec(name: str) -> Codec:
    """The codec called ``name``. Raises :class:`ExportError`."""
    if name not in CODECS:
        raise ExportError(f"unknown codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]
