"""Codecs for tests, which do not compress activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import TensorSpec
from export.packing.codecs import Shape


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


class Double(Exact):
    """A codec that packs float64 activations without loss."""

    name = "float64"

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """One tensor."""
        return (TensorSpec("h", "float64", shape),)
