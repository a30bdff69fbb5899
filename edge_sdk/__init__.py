"""Cutlayer on the device: join a hub, train the first blocks of a model, predict."""

from edge_sdk.data import Examples
from edge_sdk.device import Device, Evaluation, Prediction
from edge_sdk.errors import (
    BundleError,
    ConfigError,
    CutlayerError,
    DataError,
    HubError,
    LinkClosed,
    ProtocolError,
)

__all__ = [
    "BundleError",
    "ConfigError",
    "CutlayerError",
    "DataError",
    "Device",
    "Evaluation",
    "Examples",
    "HubError",
    "LinkClosed",
    "Prediction",
    "ProtocolError",
]
