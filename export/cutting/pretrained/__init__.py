"""Makes a SplitModel of a Hugging Face transformers model, and saves it as the original."""

from __future__ import annotations

from export.cutting.pretrained.models import TransformersModel, from_transformers, save_original

__all__ = [
    "TransformersModel",
    "from_transformers",
    "save_original",
]
