"""Builds a model from its name in a command or configuration file."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError
from export.adapters_lora.lora import Lora, add_lora
from export.bases.exported import without_trunk
from export.bases.split_width import split_width
from export.cutting.split_model import WEIGHTS, SplitModel


def build_model(source: str | None, lora: Lora | None = None) -> SplitModel:
    """Build a model, with adapters on request.

    Args:
        source: ``module:function`` that returns a SplitModel; or the folder of a transformers
            model, or its ``config.json`` for random weights.
        lora: adapters to add to the frozen model; None for none.

    Raises:
        ConfigError: ``source`` is None or does not exist, or the function does not return a
            SplitModel.
        ExportError: the transformers model cannot be cut, or the adapters do not fit it.
    """
    if source is None:
        raise ConfigError("the bundles do not say how to build the model; set model in hub.toml")
    module, colon, function = source.partition(":")
    if Path(source).exists() or not colon:
        if not Path(source).exists():
            raise ConfigError(
                f"there is no model {source!r}: give a folder, a config.json or MODULE:FUNCTION"
            )
        from export.cutting.pretrained import from_transformers

        logging.disable(logging.WARNING)  # imports of transformers warn about missing hardware
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
        # finds modules in the working folder, after Python's and installed ones
        sys.path.append("")
    try:
        imported = importlib.import_module(module)
        _check_origin(module)
        build = getattr(imported, function)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        _check_origin(module)
        raise ConfigError(
            f"cannot import the model {source!r} ({error}); give it as MODULE:FUNCTION"
        ) from error
    if not callable(build):
        raise ConfigError(
            f"{source} is a {type(build).__name__}, must be a function that returns a SplitModel"
        )
    model = build()
    if not isinstance(model, SplitModel):
        raise ConfigError(f"{source} returned a {type(model).__name__}, must be a SplitModel")
    return model


def _check_origin(module: str) -> None:
    """Check that a file of the working folder is not hidden by a module of the same name.

    Raises:
        ConfigError: it is hidden.
    """
    top = module.partition(".")[0]
    files = [path for path in (Path(f"{top}.py"), Path(top, "__init__.py")) if path.exists()]
    found = getattr(sys.modules.get(top), "__file__", None)
    if files and top in sys.modules and not any(found and path.samefile(found) for path in files):
        raise ConfigError(
            f"{files[0]} has the name of the module {top!r} of Python, of Cutlayer or of an "
            "installed package, which comes first; give the file another name"
        )


def draw_inputs(shape: Sequence[int], high: int | None) -> Tensor:
    """Random inputs (8, *shape) from a fixed seed: normal floats, or integers below ``high``.

    Args:
        shape: shape of one input.
        high: exclusive upper bound of integers; None for floats.
    """
    generator = torch.Generator().manual_seed(0)
    if high is None:
        return torch.randn((_ROWS, *shape), generator=generator)
    return torch.randint(high, (_ROWS, *shape), generator=generator)


_ROWS = 8


def model_of_bundles(folder: Path, override: str | None) -> SplitModel:
    """Build the model that a folder of bundles was exported from, with its weights.

    Args:
        folder: folder that ``cutlayer export`` has written.
        override: model to build instead of the one that the index names.

    Raises:
        ConfigError, ExportError: as :func:`model_of`.
        BundleError: index or weights cannot be read, or the weights do not fit the model.
    """
    index = BundleIndex.read(folder)
    model = model_of(index.model, index.extra, override)
    model.load(folder / WEIGHTS)
    return model


def model_of(index_model: str | None, extra: Mapping[str, Any], override: str | None) -> SplitModel:
    """Build the model that bundles were exported from.

    For an export of base networks this is one base network, cut behind its last block.

    Args:
        index_model: model that the index of the bundles names, see :func:`build_model`.
        extra: field ``extra`` of the index.
        override: model to build instead of ``index_model``.

    Raises:
        ConfigError: as :func:`build_model`.
        ExportError: as :func:`build_model`, or the model cannot be split into bases.
    """
    lora = Lora(**extra["lora"]) if extra.get("lora") else None
    model = build_model(override or index_model, lora)
    mix = extra.get("mix")
    if not mix:
        return model
    bases = split_width(model, mix["bases"], draw_inputs(mix["shape"], mix["high"]))
    return without_trunk((bases.with_dual_norms() if mix["dual_norms"] else bases).model)
