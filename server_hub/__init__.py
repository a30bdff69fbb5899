"""The hub: trains the deep part of a model for a fleet of devices, and averages every layer.

Names are imported when they are used: ``cutlayer --help`` works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server_hub.config import HubConfig
    from server_hub.hub import Hub

__all__ = ["Hub", "HubConfig"]

_HOME = {"Hub": "server_hub.hub", "HubConfig": "server_hub.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'server_hub' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
