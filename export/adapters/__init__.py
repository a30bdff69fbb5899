"""Makes a SplitModel of a transformers model, or of any module with a list of blocks."""

from __future__ import annotations

from export.adapters.modules import from_layers, from_module
from export.adapters.pretrained import TransformersModel, from_transformers, save_original

__all__ = [
    "TransformersModel",
    "from_layers",
    "from_module",
    "from_transformers",
    "save_original",
]
