"""Writes an inference graph as a program of ExecuTorch for XNNPACK, with its weights inside."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edge_sdk.bundle.store import write_atomically
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime.executorch_binding import load_binding, quiet
from export.errors import ExportError, reason
from export.formats.checking import Run
from export.formats.inference import Heads, InferenceGraph, Signature, silenced

METHOD = "forward"
METADATA = "cutlayer"
"""Name of the method that returns the metadata of a file, as JSON."""

GROUP = 32
"""Number of inputs of a linear layer that share a scale of 4-bit weights."""

Bits = Literal[4, 8]


def check_installed() -> None:
    """Raise :class:`ExportError` if ExecuTorch is not installed."""
    if importlib.util.find_spec("executorch") is None:
        raise ExportError(
            "ExecuTorch is not installed; run pip install 'cutlayer[executorch]', or write "
            "--format onnx"
        )


def write_executorch(
    path: Path, graph: InferenceGraph, signature: Signature, metadata: str, example: Tensor
) -> Run:
    """Write a graph to a ``.pte`` file with the method ``forward``, in float32.

    Args:
        path: file to write.
        graph: the graph.
        signature: inputs and outputs, with a largest ``batch``, and ``seq`` for texts.
        metadata: JSON that the file's method ``cutlayer`` returns.
        example: inputs (batch, ...), at least 2 rows.

    Returns:
        A function that runs the file on one thread.

    Raises:
        ExportError: ExecuTorch is not installed, or cannot lower the graph.
        OSError: the file cannot be written.
    """
    check_installed()
    with silenced():
        try:
            data = _lowered(graph.program(signature, example), metadata)
        except Exception as error:  # passes of ExecuTorch raise errors of any class
            raise ExportError(
                f"ExecuTorch cannot lower the model ({reason(error)}); write --format onnx"
            ) from error
    write_atomically(path, data)
    return open_executorch(data, graph.names, ["x", *(["robustness"] if graph.dual else [])])


def write_quantized(
    path: Path, module: Heads, signature: Signature, bits: Bits, metadata: str, example: Tensor
) -> tuple[nn.Module, Run]:
    """Write a model whose linear layers have 8-bit or 4-bit weights and 8-bit activations.

    XNNPACK quantizes the activations of each row as it computes (torchao's
    ``Int8DynamicActivationIntxWeightConfig``). Weights have a scale for each output in 8 bits, and
    for each :data:`GROUP` inputs of an output in 4 bits. Everything else is float32.

    Args:
        path: file to write.
        module: the model; it is not changed.
        signature: inputs and outputs, with a largest ``batch``, and ``seq`` for texts.
        bits: 8 or 4.
        metadata: JSON that the file's method ``cutlayer`` returns.
        example: inputs (batch, ...), at least 2 rows.

    Returns:
        The quantized model in PyTorch, and a function that runs the file on one thread.

    Raises:
        ExportError: ExecuTorch is not installed, the model has no linear layer that can be
            quantized so, or ExecuTorch cannot lower it.
        OSError: the file cannot be written.
    """
    check_installed()
    with silenced():
        quantized = _quantized(module, bits)
        try:
            data = _lowered(InferenceGraph(quantized, {}).program(signature, example), metadata)
        except Exception as error:  # passes of ExecuTorch raise errors of any class
            raise ExportError(
                f"ExecuTorch cannot lower the model with {bits}-bit weights ({reason(error)}); "
                "write --format executorch, or onnx-int8"
            ) from error
    write_atomically(path, data)
    return quantized, open_executorch(data, module.names, ["x"])


def _quantized(module: Heads, bits: Bits) -> Heads:
    """A copy of the model with quantized linear layers."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    copied = copy.deepcopy(module).requires_grad_(False)
    _as_linear(copied)
    fits = {
        name
        for name, part in copied.named_modules()
        if type(part) is nn.Linear and (bits == 8 or part.in_features % GROUP == 0)
    }
    if not fits:
        what = (
            "no linear layer" if bits == 8 else f"no linear layer with {GROUP} inputs or a multiple"
        )
        nearest = "executorch-int8" if bits == 4 and _linear(copied) else "executorch"
        raise ExportError(
            f"executorch-int{bits} quantizes linear layers, and the model has {what}; the nearest "
            f"format is {nearest}, with onnx-int8 for a small file"
        )
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8 if bits == 8 else getattr(torch, "int4"),  # noqa: B009
        weight_granularity=PerAxis(0) if bits == 8 else PerGroup(GROUP),
    )
    quantize_(copied, config, lambda part, name: name in fits)
    return copied


def _linear(module: nn.Module) -> bool:
    return any(type(part) is nn.Linear for part in module.modules())


def _as_linear(module: nn.Module) -> None:
    """Replace the linear layers of GPT-2 in transformers, whose weights are (in, out)."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if type(part).__name__ == "Conv1D":
                weight, bias = part.get_parameter("weight"), part.get_parameter("bias")
                layer = nn.Linear(*weight.shape)
                with torch.no_grad():
                    layer.weight.copy_(weight.T)
                    layer.bias.copy_(bias)
                setattr(parent, name, layer.eval().requires_grad_(False))


def _lowered(program: ExportedProgram, metadata: str) -> bytes:
    from export.lowering.executorch_internals import to_inference_file

    data, operators = to_inference_file(program, {METADATA: metadata})
    missing = sorted(operators - load_binding().kernels())
    if missing:
        raise ExportError(f"there is no kernel for {missing[0]}")
    return data


def open_executorch(data: bytes, names: Sequence[str], inputs: Sequence[str]) -> Run:
    """A function that runs the method ``forward`` of a file on one thread.

    Args:
        data: content of the file.
        names: names of the outputs, in order.
        inputs: names of the inputs, in order.
    """
    binding = load_binding()
    with quiet():
        binding.set_threads(1)
        module = binding.open(data)
        module.run_method(METADATA, [])  # loads what logs

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        arrays = [given.get(name, np.zeros((), np.float32)) for name in inputs]
        tensors = [torch.from_numpy(np.array(array, order="C")) for array in arrays]
        outputs: Any = module.run_method(METHOD, tensors)
        assert data  # the module reads it in place
        return {n: t.numpy().copy() for n, t in zip(names, outputs, strict=True)}

    return run
