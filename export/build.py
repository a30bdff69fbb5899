"""Models by import path, as commands and configuration files name them."""

from __future__ import annotations

import importlib
import sys

from edge_sdk.errors import ConfigError
from export.split import SplitModel


def build_model(path: str | None) -> SplitModel:
    """Build the model from ``module:function``.

    Raises:
        ConfigError: there is no such function, or it does not return a SplitModel.
    """
    if path is None:
        raise ConfigError("the bundles do not say how to build the model; set model in hub.toml")
    module_name, _, function = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the module may stand in the folder that the command runs in
    try:
        build = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import the model {path!r} ({error}); give it as MODULE:FUNCTION"
        ) from error
    model = build()
    if not isinstance(model, SplitModel):
        raise ConfigError(f"{path} returned a {type(model).__name__}, must be a SplitModel")
    return model
