"""Codecs: pack activations in the step graph, and unpack them in torch on the hub.

A codec is a pair of pure functions. ``pack`` is traced into the step graphs, so a graph returns the
tensors that travel; ``unpack`` runs on the hub's device. To add a codec, write a class here and add
it to :data:`CODECS`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import TensorSpec
from export.errors import ExportError

Shape = tuple[int | str, ...]


class Codec(Protocol):
    """Packs activations (batch, ...) into named tensors, and unpacks them.

    Only packing needs the axis of the channels; unpacking needs the packed tensors alone.
    """

    name: str

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Packed tensors by name; no gradient flows into ``h``."""

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Activations in float32, on the device of the parts."""

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the packed tensors of activations (batch, ...)."""

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """The packed tensors of finite ``h`` before rounding, for verification, in its dtype."""

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """Largest error of ``unpack(pack(h))`` in exact arithmetic; broadcasts with ``h``."""


class Int8PerChannel:
    """8-bit integers with one scale per channel of a batch: ``h ~ q * scale``.

    ``scale = max|h| / 127`` over the batch and positions of a channel, in a shape that broadcasts.
    A channel of zeros has the smallest scale, 1e-12 / 127, and codes of zero.
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

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        rows = h.movedim(channel_axis, 0).flatten(1)
        largest = torch.maximum(rows.amax(1), -rows.amin(1))
        shape = [1] * h.dim()
        shape[channel_axis] = -1
        scale = torch.where(largest < self._TINY, self._TINY, largest).reshape(shape) / 127
        return {"h.q": h / scale, "h.scale": scale}

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h.scale"] / 2


class Fp16:
    """float16; values beyond its range are clamped to it."""

    name = "fp16"
    _MAX = 65504.0

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        return {"h": h.detach().clamp(-self._MAX, self._MAX).to(torch.float16)}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32)

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("h", "float16", shape),)

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        limit = torch.full_like(h, self._MAX)
        return {"h": torch.minimum(torch.maximum(h, -limit), limit)}

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32).abs() * 2**-11 + 2**-25


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8PerChannel(), Fp16())}


def get_codec(name: str) -> Codec:
    """The codec called ``name``; raises :class:`ExportError` if there is none."""
    if name not in CODECS:
        raise ExportError(f"unknown codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]
