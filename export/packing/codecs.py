"""Codecs: pack activations in the step graph, and unpack them in torch on the hub.

A codec is a pair of pure functions. ``pack`` is traced into the step graphs, so a graph returns the
tensors that travel; ``unpack`` runs on the hub's device. To add a codec, write a class here and add
it to :data:`CODECS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import TensorSpec
from export.errors import ExportError

Shape = tuple[int | str, ...]

_GROUP = 32
"""Smallest number of values that get a scale of their own: it takes an eighth of their bytes."""


class Codec(Protocol):
    """Packs activations (batch, ...) into named tensors, and unpacks them.

    A row is packed alone: what is unpacked of it does not depend on the rest of the batch. A value
    that is not finite makes some of the values unpacked of its row not finite, so that the other
    side can refuse them. Large finite values stay finite. Only packing needs the axis of the
    channels; unpacking needs the packed tensors alone.
    """

    name: str

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Packed tensors by name, as ``specs`` says; no gradient flows into ``h``."""

    def pack_as(self, h: Tensor, shapes: Mapping[str, Sequence[int | str]]) -> dict[str, Tensor]:
        """Packed tensors of these shapes, by name: those of a manifest, or of other such tensors.

        A bundle of an earlier version may want other shapes than ``specs`` says today.
        """

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Activations in float32, on the device of the parts."""

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the packed tensors of activations (batch, ...)."""

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """The packed tensors of finite ``h`` before rounding, for verification, in its dtype."""

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """Largest error of ``unpack(pack(h))`` in exact arithmetic; broadcasts with ``h``."""


class Int8:
    """8-bit integers with a scale for each group of values of a row: ``h ~ q * scale``.

    ``scale = max|h| / 127`` over the group, in a shape that broadcasts with the codes. Where
    channels come last, a group is the channels at one position of a row: then a position of a text
    depends neither on later ones nor on padding. Where they come first, it is a channel of a row
    if a row has at least 32 positions; else the channels at one position if there are at least 32;
    else the row.

    A group of zeros has the smallest scale, 1e-12 / 127, and codes of zero. The scale of a group
    with a value that is not finite is not finite; its codes mean nothing.
    """

    name = "int8"
    _TINY = 1e-12

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        return self._pack(h, _group(h.shape, channel_axis))

    def pack_as(self, h: Tensor, shapes: Mapping[str, Sequence[int | str]]) -> dict[str, Tensor]:
        return self._pack(h, [axis for axis, n in enumerate(shapes["h.scale"]) if n == 1])

    def _pack(self, h: Tensor, group: list[int]) -> dict[str, Tensor]:
        """Pack with one scale for all values along the axes ``group``."""
        h = h.detach()
        # times 1 / 127: the largest float32 divided by 127 is rounded up, and its product with
        # 127 would be infinite
        scale = h.abs().amax(group, keepdim=True).clamp(min=self._TINY) * (1 / 127)
        codes = h / scale
        # a maximum may pass over NaN, a sum never does; the codes of infinity are NaN
        scale = scale + 0.0 * codes.sum(group, keepdim=True)
        return {"h.q": torch.round(codes).to(torch.int8), "h.scale": scale}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h.q"].to(torch.float32) * parts["h.scale"]

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        group = _group(shape, channel_axis)
        scales = tuple(1 if axis in group else n for axis, n in enumerate(shape))
        return TensorSpec("h.q", "int8", shape), TensorSpec("h.scale", "float32", scales)

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        group = _group(h.shape, channel_axis)
        largest = torch.maximum(h.amax(group, keepdim=True), -h.amin(group, keepdim=True))
        scale = torch.where(largest < self._TINY, self._TINY, largest) / 127
        return {"h.q": h / scale, "h.scale": scale}

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h.scale"] / 2


def _group(shape: Sequence[int | str], channel_axis: int) -> list[int]:
    """Axes of the values that share a scale, see :class:`Int8`."""
    inner = range(1, len(shape))
    positions = [axis for axis in inner if axis != channel_axis]
    if channel_axis == inner[-1]:
        return [channel_axis]
    if math.prod(n for axis in positions if isinstance(n := shape[axis], int)) >= _GROUP:
        return positions
    channels = shape[channel_axis]
    return [channel_axis] if isinstance(channels, int) and channels >= _GROUP else list(inner)


class Fp16:
    """float16; finite values beyond its range are clamped to it."""

    name = "fp16"
    _MAX = 65504.0

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        h = h.detach()
        # the difference is 0 for finite values, else NaN; a clamp may let NaN vanish
        return {"h": (h.clamp(-self._MAX, self._MAX) + (h - h)).to(torch.float16)}

    def pack_as(self, h: Tensor, shapes: Mapping[str, Sequence[int | str]]) -> dict[str, Tensor]:
        return self.pack(h, 1)

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32)

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("h", "float16", shape),)

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        limit = torch.full_like(h, self._MAX)
        return {"h": torch.minimum(torch.maximum(h, -limit), limit)}

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"].to(torch.float32).abs() * 2**-11 + 2**-25


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8(), Fp16())}


def get_codec(name: str) -> Codec:
    """The codec called ``name``; raises :class:`ExportError` if there is none."""
    if name not in CODECS:
        raise ExportError(f"unknown codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]
