"""Which parameters weight decay applies to, on devices and in the trunk alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from export.bases.dual_norms import is_norm
from export.errors import ExportError

Decay = Literal["matrices", "all"]
"""``matrices`` leaves norms, biases and embeddings alone; ``all`` decays every parameter."""


def decayed_names(module: nn.Module, decay: str) -> frozenset[str]:
    """Names of the parameters of a module that weight decay applies to.

    With ``matrices`` these are the weights of linear layers, convolutions, attention, recurrent
    layers and low-rank adapters. A parameter is left alone if it belongs to a norm or to an
    embedding, is called ``bias``, or has fewer than two dimensions. A tied parameter is left alone
    if one of its modules asks for that.

    Args:
        module: a model or a part of it.
        decay: ``matrices`` or ``all``.

    Raises:
        ExportError: ``decay`` is neither.
    """
    if decay not in get_args(Decay):
        raise ExportError(f"decay is {decay!r}; it must be one of {', '.join(get_args(Decay))}")
    alone: set[int] = set()
    for part in module.modules() if decay == "matrices" else ():
        whole = is_norm(part) or _is_embedding(part)
        for name, parameter in part.named_parameters(recurse=False):
            if whole or name == "bias" or parameter.dim() < 2:
                alone.add(id(parameter))
    return frozenset(n for n, p in module.named_parameters() if id(p) not in alone)


def decay_of_bundles(extra: Mapping[str, Any]) -> Decay:
    """The setting that bundles were exported with.

    Args:
        extra: further entries of the index of the bundles. Without an entry ``decay`` the bundles
            are older than the setting, and all their parameters decay.

    Raises:
        ExportError: the entry has another value.
    """
    found = extra.get("decay", "all")
    for known in get_args(Decay):
        if found == known:
            return known  # type: ignore[no-any-return]
    raise ExportError(f"the index of the bundles has decay {found!r}; export again")


def _is_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding.

    Those of vision transformers hold tokens and positions themselves, and each family has its own
    class; they are recognised by its name.
    """
    known = (nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, known) or type(module).__name__.endswith(("Embedding", "Embeddings"))
