"""Tied tensors: those of the stem that heads read as well, such as a table of tokens.

The gradient of such a tensor is a sum: a part comes through the stem and the blocks, and each head
that reads the tensor adds a part. Wherever a head is trained, its part is computed.
"""

from __future__ import annotations

from export.cutting.heads import TokenHead
from export.cutting.split_model import SplitModel


def tied_tensors(model: SplitModel) -> dict[str, list[str]]:
    """Names of the heads that read trained tensors of the stem, by the name of the tensor.

    For example ``{"stem.embedding.weight": ["aux.2", "head"]}``.
    """
    heads = {**{f"aux.{d}": model.aux[str(d)] for d in model.head_depths}, "head": model.head}
    table = getattr(model.stem, "embedding", None)
    tied: dict[str, list[str]] = {}
    for name, tensor in model.stem.named_parameters("stem"):
        readers = [
            layer
            for layer, head in heads.items()
            if any(tensor is own for own in head.parameters())
            or (isinstance(head, TokenHead) and table is not None and tensor is table.weight)
        ]
        if readers and tensor.requires_grad:
            tied[name] = readers
    return tied


def tied_to_head(model: SplitModel) -> tuple[str, ...]:
    """Names of the trained tensors of the stem that the model's head reads as well."""
    return tuple(name for name, heads in tied_tensors(model).items() if "head" in heads)
