"""Exports a PyTorch model as bundles: cuts it per tier and lowers its training steps.

Public names are imported on first use, so that ``cutlayer --help`` works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.bundle.index import BundleIndex
    from export.adapters.pretrained import from_transformers
    from export.errors import ExportError
    from export.split import SplitModel
    from export.writer import Tier, export_bundles

__all__ = [
    "BundleIndex",
    "ExportError",
    "SplitModel",
    "Tier",
    "export_bundles",
    "from_transformers",
]

_HOME = {
    "ExportError": "export.errors",
    "SplitModel": "export.split",
    "BundleIndex": "edge_sdk.bundle.index",
    "Tier": "export.writer",
    "export_bundles": "export.writer",
    "from_transformers": "export.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
