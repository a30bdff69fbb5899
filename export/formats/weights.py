"""Writes the weights of a trained model: as transformers or PyTorch load them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file

from export.adapters_lora.lora import adapted_modules
from export.adapters_lora.peft_format import base_fingerprint, load_adapter, save_adapter
from export.cutting.pretrained import TransformersModel, from_transformers, save_original
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.tensor_files import save_tensors


def write_transformers(folder: Path, model: SplitModel) -> None:
    """Write a folder that ``from_pretrained`` of transformers loads.

    It is loaded again, and every tensor compared with the model's in the dtype of the file.

    Args:
        folder: a new folder.
        model: the model, adapters merged.

    Raises:
        ExportError: the model does not come from transformers, or what was written differs.
    """
    if not isinstance(model, TransformersModel):
        raise ExportError(
            "the model does not come from transformers; the nearest format is safetensors"
        )
    save_original(model, folder)
    again = from_transformers(folder).origin
    assert again.checkpoint is not None
    own, names = model.state_dict(), {**again.names, **model.origin.names}
    for file, shapes in again.checkpoint.files.items():
        stored = load_file(folder / file)
        for original in shapes.keys() & names.keys():
            want = own[names[original]].to(stored[original].dtype)
            if not torch.equal(want, stored[original]):
                raise ExportError(f"the folder differs from the model in {original}")


def write_peft(folder: Path, model: SplitModel, base: str) -> None:
    """Write adapters that ``PeftModel.from_pretrained`` loads on the original model.

    They are loaded again into a copy of the model, and compared.

    Args:
        folder: a new folder.
        model: the model with its adapters.
        base: name of the original model in the files.

    Raises:
        ExportError: the model does not come from transformers, has no adapters, or what was
            written differs.
    """
    if not isinstance(model, TransformersModel):
        raise ExportError(
            "PEFT adapts models of transformers, and the model does not come from there; the "
            "nearest format is safetensors, with the adapters merged"
        )
    if not adapted_modules(model):
        raise ExportError("the model has no adapters; the nearest format is transformers")
    origin = model.origin
    with_base = from_transformers(origin.checkpoint.folder if origin.checkpoint else origin.config)
    if base_fingerprint(with_base) != base_fingerprint(model):
        raise ExportError(
            "the adapters were trained on another base than the model's own weights, and PEFT "
            "would add them to those; the nearest format is transformers, with the adapters merged"
        )
    save_adapter(model, folder, base)
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    again = copy.deepcopy(model, dict(frozen))
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_adapter(again, folder)
    for name, tensor in again.named_parameters():
        if ".lora_" in name and not torch.equal(tensor, model.get_parameter(name)):
            raise ExportError(f"the adapter that was written differs in {name}")


def write_safetensors(path: Path, model: SplitModel, metadata: dict[str, str]) -> None:
    """Write the tensors of the module that the model was made of, under that module's names.

    A model that was written as stem, blocks and head has these names, and auxiliary heads too.

    Args:
        path: file to write.
        model: the model, adapters merged.
        metadata: text by name, for the file's metadata.
    """
    state = model.state_dict()
    names = model.original_names or {name: name for name in model.tensors()}
    tensors = {original: state[name].contiguous().clone() for name, original in names.items()}
    save_tensors(tensors, path, metadata)
    for name, tensor in load_file(path).items():
        if not torch.equal(tensor, tensors[name]):
            raise ExportError(f"{path.name} differs from the model in {name}")
