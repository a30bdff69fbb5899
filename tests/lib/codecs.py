"""Codecs for tests, which do not compress activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import TensorSpec
from export.packing.codecs import Int8, Shape


class Exact:
    """A codec that packs float32 activations without loss."""

    name = "float32"

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Pack the detached activations."""
        return {"h": h.detach() + 0.0}

    def pack_as(self, h: Tensor, shapes: Mapping[str, Sequence[int | str]]) -> dict[str, Tensor]:
        """Pack the detached activations, whose shape there is no choice of."""
        return self.pack(h, 1)

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the packed activations."""
        return parts["h"]

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """One tensor."""
        return (TensorSpec("h", "float32", shape),)

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """Return zero."""
        return torch.zeros(())


class PerChannel(Int8):
    """int8 as in earlier bundles: one scale per channel, for all rows of a batch."""

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Pack the detached activations."""
        scales = [n if axis == channel_axis else 1 for axis, n in enumerate(h.shape)]
        return self.pack_as(h, {"h.scale": scales})

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """Codes and scales."""
        scales = tuple(n if axis == channel_axis else 1 for axis, n in enumerate(shape))
        return TensorSpec("h.q", "int8", shape), TensorSpec("h.scale", "float32", scales)

    def unrounded(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """Codes before rounding, and scales."""
        others = [axis for axis in range(h.dim()) if axis != channel_axis]
        scale = h.abs().amax(others, keepdim=True).clamp(min=1e-12) / 127
        return {"h.q": h / scale, "h.scale": scale}


class Double(Exact):
    """A codec that packs float64 activations without loss."""

    name = "float64"

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """One tensor."""
        return (TensorSpec("h", "float64", shape),)
