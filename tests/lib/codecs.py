"""Codecs that tests alone use: activations cross the cut as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import TensorSpec
from export.packing import Shape


class Exact:
    """A codec that packs float32 as it is."""

    name = "float32"

    def pack(self, h: Tensor, channel_axis: int) -> dict[str, Tensor]:
        """The activations."""
        return {"h": h.detach() + 0.0}

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """The same."""
        return parts["h"]

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """One tensor."""
        return (TensorSpec("h", "float32", shape),)

    def error_bound(self, parts: dict[str, Tensor]) -> Tensor:
        """None at all."""
        return torch.zeros(())


class Double(Exact):
    """Activations in float64, as they are."""

    name = "float64"

    def specs(self, shape: Shape, channel_axis: int) -> tuple[TensorSpec, ...]:
        """One tensor."""
        return (TensorSpec("h", "float64", shape),)
