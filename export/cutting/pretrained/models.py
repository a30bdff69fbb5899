"""Makes a SplitModel of a Hugging Face transformers model, and saves it as the original."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edge_sdk.files import read_text
from export.cutting.pretrained.checkpoint import Checkpoint
from export.cutting.pretrained.families import FAMILIES, Family, Parts
from export.cutting.split_model import SplitModel
from export.errors import ExportError, reason
from export.out_folder import new_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SEED = 0
_EAGER = "eager"
"""Attention as plain matrix products, which is what a step graph computes on every device."""


@dataclass(frozen=True)
class Origin:
    """Source of a SplitModel, and the names of its tensors there.

    Attributes:
        config: configuration of transformers, as given.
        architecture: class name in transformers.
        checkpoint: weights that the model was loaded from, if any.
        names: name of a tensor in the SplitModel by its name in the checkpoint, or without a
            checkpoint by its name in the class of transformers.
        added: the same for tensors of a new head, which the checkpoint lacks.
    """

    config: PretrainedConfig
    architecture: str
    checkpoint: Checkpoint | None
    names: Mapping[str, str]
    added: Mapping[str, str]


class TransformersModel(SplitModel):
    """A SplitModel around the layers of a transformers model.

    Attributes:
        origin: source of the model, for :func:`save_original`.
    """

    origin: Origin

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.stem, parts.blocks, parts.head, parts.task, channels=parts.channels)

    def names_of(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Names in this model of tensors of the original, by their original name.

        Tensors that this model does not use are left out.
        """
        own: dict[int, str] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            own.setdefault(id(tensor), name)
        return {key: own[id(t)] for key, t in tensors.items() if id(t) in own}


def from_transformers(source: str | Path | PretrainedConfig) -> TransformersModel:
    """Take a transformers model apart into a SplitModel, without downloading anything.

    The SplitModel has the layers of the model, in float32 and in training mode; tied weights stay
    tied. In evaluation mode it returns the logits of the original. BERT reads tokens equal to
    ``pad_token_id`` as padding; texts for decoders are padded on the right.

    Args:
        source: a folder with ``config.json`` and safetensors; or, for random weights from a fixed
            seed, the path of a ``config.json`` or a configuration. The class is the one in
            ``architectures``, or the default of the family (BERT: sequence classification). If
            the folder holds a model without a head, the head is random, from a fixed seed.

    Raises:
        ExportError: transformers is not installed, the family is not supported, or the folder is
            incomplete or damaged.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ExportError("transformers is not installed; pip install 'cutlayer[transformers]'")
    config, checkpoint = _read(source)
    family = _family(config)
    architecture = _architecture(family, config)
    original = _build(architecture, config, checkpoint)
    tensors: dict[str, Tensor] = original.state_dict(keep_vars=True)
    added: dict[str, Tensor] = {}
    if checkpoint is not None:
        headless = family.base in (config.architectures or ())
        tensors, added = _match(original, checkpoint, headless)
    model = TransformersModel(family.architectures[architecture](original))
    names, new = model.names_of(tensors), model.names_of(added)
    model.origin = Origin(config, architecture, checkpoint, names, new)
    return model.train()


def save_original(model: SplitModel, folder: str | Path) -> None:
    """Write a model of :func:`from_transformers` to a folder that ``from_pretrained`` loads.

    If the model was loaded from a folder, the files, names, dtypes, unused tensors, configuration
    and tokenizer are those of that folder, which must still exist. LoRA adapters and auxiliary
    heads are not written.

    Args:
        model: a model from :func:`from_transformers`.
        folder: a new or empty folder. It appears only when everything is written.

    Raises:
        ExportError: the model is not from :func:`from_transformers`, ``folder`` is not empty, or
            the source folder is gone.
    """
    if not isinstance(model, TransformersModel):
        raise ExportError(
            "this model does not come from transformers; save its weights with model.save"
        )
    origin, state = model.origin, model.state_dict()
    values = {key: _base(state, name) for key, name in origin.names.items()}
    with new_folder(Path(folder)) as out:
        if origin.checkpoint is not None:
            added = {key: _base(state, name).cpu() for key, name in origin.added.items()}
            origin.checkpoint.rewrite(out, values, added)
            origin.checkpoint.copy_others(out)
        else:
            original = _build(origin.architecture, origin.config, None)
            tensors = original.state_dict()
            for key, value in values.items():
                tensors[key].copy_(value)
            with _quiet():
                original.save_pretrained(out)


def _base(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor by its name; if PEFT has wrapped the module, the tensor of its base layer."""
    parent, _, leaf = name.rpartition(".")
    for candidate in (name, f"{parent}.base_layer.{leaf}"):
        if candidate in state:
            return state[candidate]
    raise ExportError(f"the model has no {name} any more; it cannot be saved as the original")


def _read(source: str | Path | PretrainedConfig) -> tuple[PretrainedConfig, Checkpoint | None]:
    if not isinstance(source, str | Path):
        return copy.deepcopy(source), None
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = f"{path} has no config.json" if path.is_dir() else f"there is no {path}"
        raise ExportError(f"{what}; give a folder of transformers' save_pretrained, or a config")
    config = _read_config(file)
    return config, Checkpoint.find(path) if path.is_dir() else None


def _read_config(file: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        raw = json.loads(read_text(file))
        _known(raw["model_type"])
        with _quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(file, local_files_only=True)
    except ExportError:
        raise
    except KeyError:
        raise ExportError(f"{file} has no model_type; is it a configuration of a model?") from None
    except Exception as error:
        raise ExportError(f"{file} is no valid configuration: {reason(error)}") from error
    return config


def _known(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ExportError(
            f"models of type {model_type!r} are not supported; there are {', '.join(FAMILIES)} "
            "(others: from_module)"
        )
    return FAMILIES[model_type]


def _family(config: PretrainedConfig) -> Family:
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError("the weights are quantised; give the model in float32, float16, bfloat16")
    return _known(config.model_type)


def _architecture(family: Family, config: PretrainedConfig) -> str:
    named: list[str] = list(config.architectures or ())
    for name in named:
        if name in family.architectures:
            return name
    if not named or family.base in named:
        return family.default
    raise ExportError(
        f"{', '.join(named)} is not supported; of {config.model_type} there are "
        f"{', '.join(family.architectures)}"
    )


def _build(
    architecture: str, config: PretrainedConfig, checkpoint: Checkpoint | None
) -> PreTrainedModel:
    """Build the transformers model in float32; weights without a checkpoint have a fixed seed."""
    import transformers

    kind = getattr(transformers, architecture)
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": _EAGER}
    config = copy.deepcopy(config)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            if checkpoint is None:
                model: PreTrainedModel = kind._from_config(config, **settings)
            else:
                model = kind.from_pretrained(
                    checkpoint.folder,
                    config=config,
                    local_files_only=True,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # found and named by _match
                    **settings,
                )
    except Exception as error:
        raise ExportError(
            f"transformers cannot make the {architecture}: {reason(error)}"
        ) from error
    return model


def _match(
    original: PreTrainedModel, checkpoint: Checkpoint, headless: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Match the tensors of a checkpoint with those of the model.

    Returns:
        The model's tensors by their name in the checkpoint; and, for a ``headless`` checkpoint,
        the head's tensors, which it lacks, by their name in the model.

    Raises:
        ExportError: the checkpoint lacks any other tensor, or a tensor has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state: dict[str, Tensor] = original.state_dict(keep_vars=True)
    prefix = original.base_model_prefix
    mapping = get_model_conversion_mapping(original)
    renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
    found: dict[str, Tensor] = {}
    wrong = []
    for key, shape in checkpoint.shapes.items():
        name, _ = rename_source_key(key, renamings, [], prefix, state)
        if name in state:
            found[key] = state[name]
            if state[name].shape != shape:
                wrong.append(f"{key} is {list(shape)}, must be {list(state[name].shape)}")
    seen = {id(t) for t in found.values()}
    added: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if headless and not name.startswith(f"{prefix}."):
            added[name] = tensor
        else:
            wrong.append(f"{name} is missing")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ExportError(
            f"the weights in {checkpoint.folder} are not those of its config.json: "
            f"{'; '.join(wrong[:3])}{more}"
        )
    return found, added


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
