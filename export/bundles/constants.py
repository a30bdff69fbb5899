"""Stores the frozen tensors of a tier: one blob per layer, which all graphs and tiers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from edge_sdk.bundle.manifest import Constants
from edge_sdk.bundle.store import BlobStore
from edge_sdk.protocol.tensors import DTYPES, TensorSpec
from export.lowering.onnx import Place
from export.tensor_names import layer_of

_SMALLEST = 1024
"""Smallest size in bytes of a constant that is stored outside of the graphs."""

_ALIGNMENT = 64


@dataclass
class StoredConstants:
    """Frozen tensors that are stored outside of the graphs.

    Attributes:
        entries: blobs with the tensors in them, for the manifest.
        places: place of each tensor by name, for the graphs.
        sizes: size of each blob in bytes, by its name.
    """

    entries: list[Constants] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def joined(self, other: StoredConstants) -> StoredConstants:
        """These constants and others."""
        return StoredConstants(
            [*self.entries, *other.entries],
            {**self.places, **other.places},
            {**self.sizes, **other.sizes},
        )


def store_constants(
    tensors: Mapping[str, Tensor], blobs: BlobStore, smallest: int = _SMALLEST
) -> StoredConstants:
    """Store frozen tensors, one blob per layer, so that tiers share the blobs of layers.

    Small tensors and those of dtypes that a manifest cannot name stay in the graphs. Tensors are
    written from where they are in memory: a frozen model is never copied.

    Args:
        tensors: frozen tensors by name.
        blobs: store to write to.
        smallest: smallest size in bytes of a tensor that is stored here.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.nbytes >= smallest and str(tensor.dtype).removeprefix("torch.") in DTYPES:
            layers.setdefault(layer_of(name), {})[name] = tensor
    stored = StoredConstants()
    for held in layers.values():
        specs, offsets = [], []
        with blobs.writing() as blob:
            for name, tensor in held.items():
                blob.write(bytes(-blob.size % _ALIGNMENT))
                dtype = str(tensor.dtype).removeprefix("torch.")
                specs.append(TensorSpec(name, dtype, tuple(tensor.shape)))
                offsets.append(blob.size)
                blob.write(np.ravel(tensor.contiguous().numpy()).view(np.uint8).data)
        stored.entries.append(Constants(blob.name, tuple(specs), tuple(offsets)))
        stored.sizes[blob.name] = blob.size
        for spec, offset in zip(specs, offsets, strict=True):
            stored.places[spec.name] = Place(blob.name, offset, spec.nbytes())
    return stored
