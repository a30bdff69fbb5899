"""Writes an inference graph as an ONNX file with its weights inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from edge_sdk.bundle.store import write_atomically
from edge_sdk.files import naming
from edge_sdk.protocol.tensors import Array
from export.errors import ExportError, reason
from export.formats.checking import Run
from export.formats.inference import InferenceGraph, Signature, silenced

OPSET = 18
"""Version of ONNX's operators: that of bundles, which older runtimes read too."""

LARGEST_FILE = 1_500_000_000
"""Bytes of weights beyond which they are in a file beside: protobuf ends at 2 GB."""


def write_onnx(
    path: Path,
    graph: InferenceGraph,
    signature: Signature,
    metadata: Mapping[str, str],
    example: Tensor,
) -> Run:
    """Write a graph to an ONNX file of standard operators, by torch's own exporter.

    Weights of more than 1.5 GB are in a second file, called like the first with ``.data``.

    Args:
        path: file to write.
        graph: the graph.
        signature: inputs and outputs.
        metadata: text by name, for ``metadata_props`` of the file.
        example: inputs (batch, ...), at least 2 rows.

    Returns:
        A function that runs the file with ONNX Runtime on one thread.

    Raises:
        ExportError: torch cannot export the graph with any batch and length.
        OSError: the file cannot be written.
    """
    size = sum(tensor.nbytes for tensor in graph.buffers())
    with silenced(), naming(path):
        try:
            torch.onnx.export(
                graph.program(signature, example),
                (),
                path,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["x", *(["robustness"] if graph.dual else [])],
                output_names=graph.names,
                external_data=size > LARGEST_FILE,
            )
        except OSError:
            raise
        except Exception as error:  # the model's code raises errors of any class
            raise ExportError(
                f"torch cannot write the model as ONNX ({reason(error)}); write --format "
                "executorch or safetensors"
            ) from error
    model = onnx.load(path, load_external_data=False)
    _strip(model)
    onnx.helper.set_model_props(model, dict(metadata))
    write_atomically(path, model.SerializeToString(deterministic=True))
    return open_onnx(path)


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes, such as the lines of code that a node comes from."""
    graph = model.graph
    graph.ClearField("value_info")
    inner = [node for function in model.functions for node in function.node]
    for part in (model, graph, *model.functions, *inner, *graph.node, *graph.input, *graph.output,
                 *graph.initializer):  # fmt: skip
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


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
