"""Which modules can be exported exactly, and which one is to blame when an export fails."""

from __future__ import annotations

from torch import nn

from export.errors import ExportError
from export.split import ClientSegment

_GROUP_NORM = "its running statistics are not part of the state; use nn.GroupNorm"
_RECURRENT = "its backward pass has no exact translation; use nn.Conv1d or attention"
_POOL = "its backward pass has no exact translation; use a convolution with a stride"

REPLACEMENTS: dict[type[nn.Module], str] = {
    nn.BatchNorm1d: _GROUP_NORM,
    nn.BatchNorm2d: _GROUP_NORM,
    nn.SyncBatchNorm: _GROUP_NORM,
    nn.LSTM: _RECURRENT,
    nn.GRU: _RECURRENT,
    nn.RNN: _RECURRENT,
    nn.MaxPool1d: _POOL,
    nn.MaxPool2d: _POOL,
    nn.AdaptiveMaxPool2d: _POOL,
    nn.AvgPool2d: _POOL,
    nn.ConvTranspose1d: "its backward pass has no exact translation; use upsampling and a Conv1d",
    nn.ConvTranspose2d: "its backward pass has no exact translation; use upsampling and a Conv2d",
}
"""Modules that are refused in a client segment, with the reason and what to use instead."""


def check_modules(segment: ClientSegment) -> None:
    """Raise :class:`ExportError` for the first module that has no exact translation."""
    for name, module in segment.named_modules():
        for kind, reason in REPLACEMENTS.items():
            if isinstance(module, kind):
                raise ExportError(f"{name} is a {type(module).__name__}: {reason}")
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            raise ExportError(
                f"{name} is a Dropout with p={module.p}: a graph has no random numbers; "
                "set p=0 in the client segment"
            )
