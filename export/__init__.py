"""Exports a PyTorch model as bundles: cuts it per tier and lowers its training steps.

Public names are imported on first use, so that ``cutlayer --help`` works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.bundle.index import BundleIndex
    from export.bundles.writer import Tier, export_bundles
    from export.cutting.pretrained.models import from_transformers
    from export.cutting.split_model import SplitModel
    from export.errors import ExportError
    from export.lowering.export_cache import ExportCache

__all__ = [
    "BundleIndex",
    "ExportCache",
    "ExportError",
    "SplitModel",
    "Tier",
    "export_bundles",
    "from_transformers",
]

_HOME = {
    "ExportCache": "export.lowering.export_cache",
    "ExportError": "export.errors",
    "SplitModel": "export.cutting.split_model",
    "BundleIndex": "edge_sdk.bundle.index",
    "Tier": "export.bundles.writer",
    "export_bundles": "export.bundles.writer",
    "from_transformers": "export.cutting.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
