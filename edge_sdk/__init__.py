"""Cutlayer on the device: join a hub, train the first blocks of a model, predict.

Names are imported when they are used, so that the protocol alone needs no websockets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.device import Device
    from edge_sdk.errors import (
        BundleError,
        ConfigError,
        CutlayerError,
        DataError,
        HubError,
        LinkClosed,
        ProtocolError,
    )
    from edge_sdk.inference.mixture import Mixture
    from edge_sdk.inference.policy import Choice, Condition, MixturePolicy, measure_latencies
    from edge_sdk.inference.prediction import Evaluation, Prediction
    from edge_sdk.sources.array_files import ArrayFiles
    from edge_sdk.sources.image_folder import ImageFolder
    from edge_sdk.sources.lines import CsvFile, JsonLines
    from edge_sdk.sources.opened import open_source
    from edge_sdk.sources.recent import Recent
    from edge_sdk.sources.sqlite import SqliteTable
    from edge_sdk.training.data import Examples, Source
    from edge_sdk.training.report import RoundReport, TrainReport

_HOME = {
    "ArrayFiles": "edge_sdk.sources.array_files",
    "BundleError": "edge_sdk.errors",
    "Choice": "edge_sdk.inference.policy",
    "Condition": "edge_sdk.inference.policy",
    "ConfigError": "edge_sdk.errors",
    "CsvFile": "edge_sdk.sources.lines",
    "CutlayerError": "edge_sdk.errors",
    "DataError": "edge_sdk.errors",
    "Device": "edge_sdk.device",
    "Evaluation": "edge_sdk.inference.prediction",
    "Examples": "edge_sdk.training.data",
    "HubError": "edge_sdk.errors",
    "ImageFolder": "edge_sdk.sources.image_folder",
    "JsonLines": "edge_sdk.sources.lines",
    "LinkClosed": "edge_sdk.errors",
    "Mixture": "edge_sdk.inference.mixture",
    "MixturePolicy": "edge_sdk.inference.policy",
    "Prediction": "edge_sdk.inference.prediction",
    "ProtocolError": "edge_sdk.errors",
    "Recent": "edge_sdk.sources.recent",
    "RoundReport": "edge_sdk.training.report",
    "Source": "edge_sdk.training.data",
    "SqliteTable": "edge_sdk.sources.sqlite",
    "TrainReport": "edge_sdk.training.report",
    "measure_latencies": "edge_sdk.inference.policy",
    "open_source": "edge_sdk.sources.opened",
}

__all__ = [
    "ArrayFiles",
    "BundleError",
    "Choice",
    "Condition",
    "ConfigError",
    "CsvFile",
    "CutlayerError",
    "DataError",
    "Device",
    "Evaluation",
    "Examples",
    "HubError",
    "ImageFolder",
    "JsonLines",
    "LinkClosed",
    "Mixture",
    "MixturePolicy",
    "Prediction",
    "ProtocolError",
    "Recent",
    "RoundReport",
    "Source",
    "SqliteTable",
    "TrainReport",
    "measure_latencies",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edge_sdk' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
