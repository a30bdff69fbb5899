"""Models by name, as commands and configuration files give them."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_sdk.errors import ConfigError
from export.bases import split_width
from export.lora import Lora, add_lora
from export.split import SplitModel
from export.whole import without_trunk


def build_model(source: str | None, lora: Lora | None = None) -> SplitModel:
    """Build a model.

    Args:
        source: ``module:function`` that returns a SplitModel; or a model of transformers: its
            folder, or a ``config.json`` for random weights.
        lora: freeze the model and adapt it.

    Raises:
        ConfigError: there is no such function, file or folder, or no SplitModel comes of it.
        ExportError: the model of transformers cannot be used.
    """
    if source is None:
        raise ConfigError("the bundles do not say how to build the model; set model in hub.toml")
    module, colon, function = source.partition(":")
    if Path(source).exists() or not colon:
        if not Path(source).exists():
            raise ConfigError(
                f"there is no model {source!r}: give a folder, a config.json or MODULE:FUNCTION"
            )
        from export.adapters import from_transformers

        logging.disable(logging.WARNING)  # what transformers imports talks about missing hardware
        try:
            adapted = from_transformers(source)
        finally:
            logging.disable(logging.NOTSET)
        if lora is not None:
            add_lora(adapted, lora, adapted.origin.config.model_type)
        return adapted
    model = _call(source, module, function)
    return model if lora is None else add_lora(model, lora)


def _call(source: str, module: str, function: str) -> SplitModel:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the module may stand in the folder that the command runs in
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import the model {source!r} ({error}); give it as MODULE:FUNCTION"
        ) from error
    model = build()
    if not isinstance(model, SplitModel):
        raise ConfigError(f"{source} returned a {type(model).__name__}, must be a SplitModel")
    return model


def draw_inputs(shape: Sequence[int], high: int | None) -> Tensor:
    """Random inputs (rows, *shape), always the same: floats, or integers below ``high``."""
    generator = torch.Generator().manual_seed(0)
    if high is None:
        return torch.randn((_ROWS, *shape), generator=generator)
    return torch.randint(high, (_ROWS, *shape), generator=generator)


_ROWS = 8


def model_of(index_model: str | None, extra: Mapping[str, Any], override: str | None) -> SplitModel:
    """The model that bundles were exported from, as their index says.

    Of base networks it is one of them, cut behind its last block.
    """
    lora = Lora(**extra["lora"]) if extra.get("lora") else None
    model = build_model(override or index_model, lora)
    mix = extra.get("mix")
    if not mix:
        return model
    bases = split_width(model, mix["bases"], draw_inputs(mix["shape"], mix["high"]))
    return without_trunk((bases.with_dual_norms() if mix["dual_norms"] else bases).model)
