"""Optimizers of torch.optim whose weight decay leaves norms, biases and embeddings alone.

Norms and embeddings are recognised by the names of their classes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ALONE = ("Norm", "Embedding")


def decays(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter of the module decays: it is a matrix of no norm and of no embedding."""
    owners = [
        (part, name)
        for part in module.modules()
        for name, own in part.named_parameters(recurse=False)
        if own is parameter
    ]
    assert owners
    return parameter.dim() > 1 and all(
        "bias" not in name and not any(kind in type(part).__name__ for kind in _ALONE)
        for part, name in owners
    )


def groups_of(
    module: nn.Module, parameters: Iterable[Tensor] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of torch.optim: those that decay, and those that do not.

    Args:
        module: the model.
        parameters: some of its parameters; all that are trained if not given.
    """
    chosen = [p for p in module.parameters() if p.requires_grad]
    if parameters is not None:
        chosen = list(parameters)  # type: ignore[arg-type]
    return [
        {"params": [p for p in chosen if decays(module, p)]},
        {"params": [p for p in chosen if not decays(module, p)], "weight_decay": 0.0},
    ]


def optimizer_of(
    module: nn.Module, hyper: Mapping[str, float], parameters: Iterable[Tensor] | None = None
) -> torch.optim.Optimizer:
    """SGD if ``hyper`` has a momentum, else AdamW, over :func:`groups_of`."""
    groups = groups_of(module, parameters)
    if "momentum" in hyper:
        names = ("lr", "momentum", "weight_decay")
        return torch.optim.SGD(groups, **{n: hyper[n] for n in names})  # type: ignore[arg-type]
    return torch.optim.AdamW(
        groups,
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
    )
