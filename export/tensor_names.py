"""Reads the layer and the kind of a tensor from its name."""

from __future__ import annotations

TIED = "tied"
"""Layer of the optimizer slots with which the hub trains tied tensors. Such a slot is called
``momentum/tied.stem.embedding.weight``; ``momentum/stem.embedding.weight`` is that of devices."""


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: ``block.3.conv.weight`` -> ``block.3``.

    An optimizer slot, ``mean/block.3.conv.weight``, belongs to the layer of its parameter.
    """
    parts = name.rpartition("/")[2].split(".")
    return ".".join(parts[:2]) if parts[0] in ("block", "aux") else parts[0]


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of a batch norm, which no optimizer changes."""
    return name.endswith((".running_mean", ".running_var"))


def is_variance(name: str) -> bool:
    """Whether a tensor holds means of squares, which are 0 or more.

    It is the running variance of a batch norm, or the slot ``square`` of AdamW. With base networks,
    the name may be that in an update, ``base.0.square/...``.
    """
    return name.endswith(".running_var") or name.rpartition("/")[0].endswith("square")


def is_slot(name: str) -> bool:
    """Whether a tensor is an optimizer slot, such as ``mean/block.3.conv.weight``."""
    return "/" in name


WAITING = "waiting"
"""Kind of the slots that hold a part of the gradient of a tied tensor, until the other part comes.
They are zero at the start and the end of a round."""


def is_waiting(name: str) -> bool:
    """Whether a tensor holds a gradient that waits, such as ``waiting/stem.embedding.weight``."""
    return name.startswith(f"{WAITING}/")


def in_head(name: str) -> bool:
    """Whether a tensor belongs to the model's head."""
    return layer_of(name) == "head"


def is_below_heads(name: str) -> bool:
    """Whether a tensor belongs to the stem or a block."""
    return not name.startswith(("aux.", "head."))
