"""Writes an inference graph as an ONNX file with its weights inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor
from torch.export import ExportedProgram

from edge_sdk.bundle.store import write_atomically
from edge_sdk.files import naming
from edge_sdk.protocol.tensors import Array
from export.formats.checking import Run
from export.lowering.onnx import Place, lower, traced
from export.steps.step import Step

LARGEST_FILE = 1_500_000_000
"""Bytes of weights beyond which they are in a file beside: protobuf ends at 2 GB."""

_ALIGNMENT = 4096
"""Of tensors in the file beside, so that they can be mapped into memory."""


def write_onnx(path: Path, step: Step, metadata: Mapping[str, str]) -> tuple[ExportedProgram, Run]:
    """Write a step to an ONNX file of standard operators.

    Weights of more than 1.5 GB are in a second file, called like the first with ``.data``.

    Args:
        path: file to write.
        step: the step, all of whose tensors are constants.
        metadata: text by name, for ``metadata_props`` of the file.

    Returns:
        The traced program, and a function that runs the file with ONNX Runtime on one thread.

    Raises:
        ExportError: the step cannot be lowered.
        OSError: the file cannot be written.
    """
    program = traced(step)
    size = sum(tensor.nbytes for tensor in step.constants.values())
    places = {}
    if size > LARGEST_FILE:
        places = _write_beside(path.with_name(f"{path.name}.data"), step.constants)
    model = onnx.load_model_from_string(lower(step, program, places))
    onnx.helper.set_model_props(model, dict(metadata))
    write_atomically(path, model.SerializeToString(deterministic=True))
    return program, open_onnx(path)


def _write_beside(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Write tensors one after the other to a file; return the place of each."""
    places, offset = {}, 0
    with naming(path), open(path, "wb") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-offset % _ALIGNMENT))
            offset += -offset % _ALIGNMENT
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            places[name] = Place(path.name, offset, tensor.nbytes)
            offset += tensor.nbytes
    return places


def open_onnx(path: Path) -> Run:
    """A function that runs an ONNX file with ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    scalars = {i.name for i in session.get_inputs() if i.name == "robustness"}

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        defaults = dict.fromkeys(scalars, _ZERO)
        return dict(zip(names, session.run(names, {**defaults, **given}), strict=True))

    return run


_ZERO = torch.zeros(()).numpy()
