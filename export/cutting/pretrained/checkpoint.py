"""Reads and rewrites the safetensors files in the folder of a transformers model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edge_sdk.files import read_text
from export.errors import ExportError
from export.tensor_files import save_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth", ".ckpt", ".onnx", ".gguf")
"""Suffixes of files with weights. They are not copied: their weights are those before training."""


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder.

    Attributes:
        folder: folder with the files.
        files: shapes of the tensors by name, for each file name.
    """

    folder: Path
    files: Mapping[str, Mapping[str, tuple[int, ...]]]

    @classmethod
    def find(cls, folder: Path) -> Checkpoint:
        """Find the weights in ``folder`` by the file names that transformers uses.

        Raises:
            ExportError: there are no weights, or only pickled ones; or a file is missing or
                damaged.
        """
        return cls(folder, {name: _shapes(folder / name) for name in _file_names(folder)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {key: shape for shapes in self.files.values() for key, shape in shapes.items()}

    def rewrite(self, out: Path, values: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> None:
        """Write the same files to ``out``, with the same tensors, dtypes and metadata.

        Args:
            out: an empty folder.
            values: new values of tensors, in any dtype. All other tensors, and tensors whose
                value has not changed, stay the same bit for bit.
            added: tensors that no file has yet; they are written to the last file.

        Raises:
            ExportError: the folder has changed since it was read, or a value is out of range for
                the dtype of its tensor.
        """
        last = list(self.files)[-1]
        for name in self.files:
            try:
                with safe_open(self.folder / name, "pt") as file:
                    metadata = file.metadata()
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ExportError(
                    f"cannot read {self.folder / name} again ({error}); saving needs the folder "
                    "that the model was loaded from"
                ) from error
            for key in tensors.keys() & values.keys():
                tensors[key] = _stored(key, values[key], tensors[key])
            if name == last:
                tensors |= added
            save_tensors(tensors, out / name, metadata)
        if last != SINGLE:
            self._write_index(out, last, added)

    def _write_index(self, out: Path, last: str, added: Mapping[str, Tensor]) -> None:
        text = read_text(self.folder / INDEX)
        if added:
            index = json.loads(text)
            index["weight_map"] |= dict.fromkeys(added, last)
            size = sum(t.numel() * t.element_size() for t in added.values())
            index.setdefault("metadata", {}).setdefault("total_size", 0)
            index["metadata"]["total_size"] += size
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (out / INDEX).write_text(text, "utf-8")

    def copy_others(self, out: Path) -> None:
        """Copy the files without weights, such as configuration and tokenizer, to ``out``."""
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and path.name != INDEX:
                shutil.copyfile(path, out / path.name)


def _file_names(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads(read_text(folder / INDEX))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{folder / INDEX} is damaged ({error}); get it again") from error
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ExportError(f"{folder / INDEX} is damaged (file names); get it again")
        return names
    if any(folder.glob("pytorch_model*.bin")):
        raise ExportError(
            f"{folder} has only pickled weights (pytorch_model.bin), which may run code when they "
            f"are read; convert them to safetensors ({SINGLE})"
        )
    raise ExportError(
        f"{folder} has no weights ({SINGLE}, or {INDEX} and its files); to start from random "
        f"weights, give {folder / 'config.json'}"
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise ExportError(f"{path} is missing, though {INDEX} names it; get it again")
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is damaged ({error}); get it again") from error


def _stored(key: str, value: Tensor, before: Tensor) -> Tensor:
    """``value`` in the dtype of ``before``, or ``before`` itself if the value has not changed."""
    value = value.detach().cpu()
    if torch.equal(before.to(value.dtype), value):
        return before
    # a copy: a file may hold tied tensors twice, and safetensors refuses shared memory
    after = value.to(before.dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.equal(after.isfinite(), value.isfinite()):
        raise ExportError(f"{key} has become too large for {before.dtype}, as which it is stored")
    return after
