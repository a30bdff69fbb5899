"""Reads and writes adapters as PEFT files, for the original transformers model."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from edge_sdk.errors import BundleError
from edge_sdk.files import read_text
from export.adapters_lora.lora import ADAPTER, adapted_modules, fit_ranks, put_adapter
from export.adapters_lora.peft_settings import check_settings
from export.cutting.pretrained import TransformersModel, from_transformers
from export.cutting.split_model import SplitModel
from export.errors import ExportError, reason
from export.out_folder import new_folder
from export.tensor_files import save_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "cutlayer_base"
"""Key in the configuration for the SHA-256 of the base that the adapters were trained on."""

T = TypeVar("T")


def save_adapter(model: SplitModel, folder: str | Path, base_name: str) -> None:
    """Write the adapters as PEFT files for ``PeftModel.from_pretrained`` on the original model.

    Modules have their names in the class of transformers; differing ranks are in
    ``rank_pattern``. Auxiliary heads are not written, since the original model has none.

    Args:
        model: a model of :func:`~export.cutting.pretrained.from_transformers` with adapters.
        folder: a new or empty folder. It appears only when everything is written.
        base_name: value of ``base_model_name_or_path`` in the files: a folder, or a name on a
            model hub. It is not checked.

    Raises:
        ExportError: the model does not come from transformers or has no adapters, or ``folder``
            is not empty.
    """
    model = _adapted(model)
    names = _original_names(model)
    modules = {names[name]: module for name, module in adapted_modules(model).items()}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, weight in zip(_keys(name), _weights(module), strict=True):
            tensors[key] = weight.detach().cpu().contiguous()
    with new_folder(Path(folder)) as out:
        save_tensors(tensors, out / WEIGHTS, {"format": "pt"})
        config = _config(model, modules)
        config.base_model_name_or_path = base_name
        config.target_modules = _targets(names.values(), modules)
        config.save_pretrained(str(out))
        written = json.loads((out / CONFIG).read_text("utf-8"))
        written[BASE] = base_fingerprint(model)
        (out / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")


def load_adapter(model: SplitModel, folder: str | Path) -> None:
    """Read PEFT files into a model that has adapters on the same modules.

    The ranks and scales become those of the files. Parameters whose rank changes are new objects,
    so an existing optimizer must be replaced.

    Args:
        model: a model of :func:`~export.cutting.pretrained.from_transformers` with adapters
            (:func:`~export.adapters_lora.lora.add_lora`).
        folder: folder written by :func:`save_adapter` or by PEFT.

    Raises:
        ExportError: a file is missing or damaged; or the adapters are of another kind, for other
            modules or for another base. Nothing was changed.
    """
    folder = Path(folder)
    model = _adapted(model)
    names = _original_names(model)
    modules = {names[name]: module for name, module in adapted_modules(model).items()}
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    _check_names(folder, tensors, modules)
    values = {name: (tensors[a], tensors[b]) for name in modules for a, b in [_keys(name)]}
    for name, module in modules.items():
        _check_shapes(folder, name, values[name], _weights(module))
    alphas = _alphas(folder, config, {name: len(A) for name, (A, _) in values.items()})
    if config.get(BASE) not in (None, base_fingerprint(model)):
        raise ExportError(
            f"the adapters in {folder} were trained on another base than this model "
            f"({config.get('base_model_name_or_path')!r}, other weights); load that base"
        )
    for name, module in modules.items():
        put_adapter(module, *values[name], alphas[name])


def load_trained(model: SplitModel, weights: Path) -> None:
    """Read the weights of a run into the model that its bundles were exported from.

    The ranks of the blocks become those of the weights.

    Args:
        model: a newly built model of :func:`~export.cutting.pretrained.from_transformers` with
            adapters.
        weights: file written by a hub or by :meth:`~export.cutting.split_model.SplitModel.save`.

    Raises:
        ExportError: the model does not come from transformers; the model or the weights have no
            adapters; or the weights have another base than the model, to which PEFT would add the
            adapters.
        BundleError: the weights cannot be read, or do not fit the model.
    """
    _adapted(model)
    try:
        with safe_open(weights, "pt") as file:
            names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
            adapters = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read the weights {weights}: {error}") from error
    if not adapters:
        raise ExportError(f"{weights} has no adapters; give a run whose bundles have [lora]")
    fit_ranks(model, adapters)
    base = base_fingerprint(model)
    model.load(weights)
    if base_fingerprint(model) != base:
        raise ExportError(
            f"the adapters in {weights} were trained on another base than the model's own; give "
            "the bundles of that run, exported from the model without other --weights"
        )


def base_fingerprint(model: SplitModel) -> str:
    """SHA-256, in hex, of the names, dtypes, shapes and values of the base's parameters.

    Parameters of adapters and auxiliary heads are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name or name.startswith("aux."):
            continue
        tensor = parameter.detach().cpu().contiguous()
        name = name.replace(".base_layer.", ".")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _adapted(model: SplitModel) -> TransformersModel:
    """Return the model; raise :class:`ExportError` if PEFT cannot name its adapters."""
    if not isinstance(model, TransformersModel):
        raise ExportError(
            "this model does not come from transformers, so PEFT has no names for its modules; "
            "save its weights with model.save"
        )
    if not adapted_modules(model):
        raise ExportError(
            "the model has no adapters; add_lora puts them in, or [lora] in tiers.toml"
        )
    return model


def _original_names(model: TransformersModel) -> dict[str, str]:
    """Name in the class of transformers of each module that has a weight, by its name here."""
    with torch.device("meta"):  # names in a checkpoint may differ from those in the class
        twin = from_transformers(model.origin.config)
    return {
        own.removesuffix(".weight"): name.removesuffix(".weight")
        for name, own in twin.origin.names.items()
        if own.endswith(".weight")
    }


def _keys(name: str) -> tuple[str, str]:
    """Names of a module's A and B in the file."""
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    return module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight


def _config(model: TransformersModel, modules: Mapping[str, Any]) -> Any:
    """Configuration of PEFT with the ranks and scales of the adapters."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    origin = model.origin
    configs: Any = model.peft_config
    config = copy.deepcopy(configs[ADAPTER])
    config.r, config.rank_pattern = _usual({n: m.r[ADAPTER] for n, m in modules.items()})
    config.lora_alpha, config.alpha_pattern = _usual(
        {n: _whole(m.lora_alpha[ADAPTER]) for n, m in modules.items()}
    )
    config.inference_mode = True
    if CAUSAL.get(origin.config.model_type) == origin.architecture:
        config.task_type = "CAUSAL_LM"
    return config


def _whole(alpha: float) -> float:
    """``alpha`` as an int if it is integral, as PEFT writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _usual(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most common value, and all other values by name."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


def _targets(originals: Iterable[str], modules: Mapping[str, Any]) -> list[str]:
    """Target modules for the configuration: the last parts of their names.

    The full names are used if other modules share a last part.
    """
    last = {name.rpartition(".")[2] for name in modules}
    matched = {name for name in originals if name.rpartition(".")[2] in last}
    return sorted(last if matched == modules.keys() else modules)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ExportError(f"there is no {path}; give a folder with an adapter of PEFT")
    try:
        config: dict[str, Any] = json.loads(read_text(path))
        config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is no configuration of LoRA ({error}); get it again") from error
    check_settings(path, {name: value for name, value in config.items() if name != BASE})
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ExportError(f"there is no {path}; the adapter must be saved as safetensors")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is damaged ({error}); get it again") from error


def _check_names(folder: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    expected = {key for name in modules for key in _keys(name)}
    if unknown := sorted(tensors.keys() - expected):
        raise ExportError(
            f"{folder} has {unknown[0]}{_more(unknown)}, and this model has no adapter there; "
            "it is for another model, or for other targets in [lora]"
        )
    if missing := sorted(expected - tensors.keys()):
        raise ExportError(
            f"{folder} lacks {missing[0]}{_more(missing)}, where this model has an adapter; "
            "it is for another model, or for other targets in [lora]"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_shapes(
    folder: Path, name: str, given: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
) -> None:
    (A, B), (down, up) = given, own
    fits = A.dim() == down.dim() and B.dim() == up.dim()
    # the ranks of A and B must be equal, but may differ from the model's
    fits = fits and A.shape[1:] == down.shape[1:] and B.shape[:1] == up.shape[:1]
    fits = fits and B.shape[2:] == up.shape[2:] and len(A) * up.shape[1] == B.shape[1] * len(down)
    fits = fits and len(A) > 0
    if not fits:
        raise ExportError(
            f"the adapter of {name} in {folder} is {list(B.shape)} times {list(A.shape)}, must be "
            f"[{len(up)}, rank{''.join(f', {n}' for n in up.shape[2:])}] times "
            f"[rank{''.join(f', {n}' for n in down.shape[1:])}]; it is for another base"
        )


def _alphas(folder: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Scale times rank of each module, with ``alpha_pattern`` read as in PEFT.

    The scale is ``alpha / rank``, or with ``use_rslora`` ``alpha / sqrt(rank)``.
    """
    alphas = {}
    try:
        patterns = dict(config.get("alpha_pattern") or {})
        for name, rank in ranks.items():
            matching = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
            alphas[name] = float(next(matching, config["lora_alpha"]))
            if config.get("use_rslora"):
                alphas[name] *= math.sqrt(rank)
    except (ValueError, KeyError, TypeError, re.error) as error:
        raise ExportError(
            f"{folder / CONFIG} has no valid lora_alpha ({reason(error)}); get it again"
        ) from error
    return alphas
