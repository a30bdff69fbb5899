"""Lowers steps to ONNX files of standard operators."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
from onnxscript import ir
from torch.export import ExportedProgram

from export.errors import ExportError, reason
from export.lowering.decompositions import FORWARD
from export.lowering.fusions import fuse
from export.lowering.onnx_internals import convert_explicitly, to_onnx, untranslated
from export.lowering.trace import trace
from export.steps.step import Step
from export.torch_internals import without_collections


@dataclass(frozen=True)
class Place:
    """Storage of a constant.

    Attributes:
        blob: name of the blob.
        offset: first byte in the blob.
        length: number of bytes.
    """

    blob: str
    offset: int
    length: int


def traced(step: Step) -> ExportedProgram:
    """The traced program of a step, with the conversions of dtypes that ONNX needs.

    Raises:
        ExportError: the step fixes the batch size, or cannot be traced.
    """
    with _explained():
        program = trace(step, FORWARD)
        fuse(program.graph_module)
        convert_explicitly(program.graph_module)
        return program


def lower(step: Step, program: ExportedProgram, places: Mapping[str, Place] | None = None) -> bytes:
    """Lower a step to an ONNX file of standard operators with the step's ports.

    Args:
        step: step to lower.
        program: its traced program, of :func:`traced`.
        places: storage of constants that become external data of the file.

    Returns:
        Content of the file.

    Raises:
        ExportError: the step has an operator without a translation, or one whose sums ONNX Runtime
            loses. The message continues the name of the module that
            :func:`export.lowering.culprit.find_culprit` finds.
    """
    with _explained(), without_collections():
        translated = to_onnx(program)
        _refer(translated.graph, step, places or {})
        model = ir.to_proto(translated)
    _rename(model.graph, step)
    _read_as_stored(model.graph)
    _prune(model.graph)
    _check_sums(model.graph)
    _strip(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextmanager
def _explained() -> Iterator[None]:
    """Turn the errors of tracing and translation into one that names the operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ExportError:
            raise
        except Exception as error:  # the traced code of a model raises errors of any class
            missing = untranslated(reason(error))
            why = f"{missing} has none" if missing else reason(error)
            raise ExportError(
                f"no ONNX translation for its training step ({why}); replace it by convolutions, "
                "linear layers, norms, attention and elementwise functions, or cut before it"
            ) from error


def referred(data: bytes) -> list[str]:
    """Names of the constants that an ONNX file refers to."""
    graph = onnx.load_model_from_string(data).graph
    return [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def _rename(graph: onnx.GraphProto, step: Step) -> None:
    """Rename inputs, outputs and constants of the graph to the names of the step."""
    names = {f"constant_{i}": name for i, name in enumerate(step.constants)}
    names |= {
        value.name: port.spec.name for value, port in zip(graph.input, step.inputs, strict=True)
    }
    copies = []
    for value, port in zip(graph.output, step.outputs, strict=False):
        if value.name in names or any(t.name == value.name for t in graph.initializer):
            # the output is an input, a constant or another output
            copies.append((value.name, port.spec.name))
        else:
            names[value.name] = port.spec.name
        value.name = port.spec.name
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for source, target in copies:
        graph.node.append(onnx.helper.make_node("Identity", [names.get(source, source)], [target]))


def _read_as_stored(graph: onnx.GraphProto) -> None:
    """Let products with a transposed constant read the constant itself.

    ONNX Runtime would transpose the constant when it loads the graph and keep both, which doubles
    the memory of a frozen model.
    """
    stored = {t.name: (t.name, False) for t in graph.initializer if len(t.dims) == 2}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info)}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in stored:
            name, flipped = stored[node.input[0]]
            stored[node.output[0]] = name, not flipped
        elif node.op_type == "MatMul" and node.input[1] in stored:
            name, flipped = stored[node.input[1]]
            if flipped and ranks.get(node.input[0]) == 2:
                node.op_type = "Gemm"
                node.attribute.append(onnx.helper.make_attribute("transB", 1))
                node.input[1] = name
            elif not flipped:
                node.input[1] = name
    read = Counter(name for node in graph.node for name in node.input)
    read.update(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        if node.op_type == "Transpose" and node.output[0] in stored and not read[node.output[0]]:
            read[node.input[0]] -= 1
            graph.node.remove(node)


def _prune(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output depends on.

    ONNX Runtime refuses external data of unused constants. ``backward``, for example, does not
    need the last bias of the segment.
    """
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):  # which are in topological order
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            inner = (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
            needed.update(name for g in inner for n in g.node for name in n.input)
    nodes, constants = kept[::-1], [t for t in graph.initializer if t.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def _check_sums(graph: onnx.GraphProto) -> None:
    """Refuse ScatterND that adds: ONNX Runtime does so on several threads without atomics."""
    for node in graph.node:
        if node.op_type == "ScatterND" and any(a.s == b"add" for a in node.attribute):
            raise ExportError(
                "it adds into rows of a tensor with ScatterND, and ONNX Runtime loses sums there "
                "between its threads; use index_add, scatter_add or an embedding, or export the "
                "tier for executorch"
            )


def _strip(model: onnx.ModelProto) -> None:
    """Remove debugging information of the exporter, which makes a file about ten times larger."""
    model.graph.ClearField("value_info")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    for part in (
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _refer(graph: ir.Graph, step: Step, places: Mapping[str, Place]) -> None:
    """Replace constants by references, before serialization: nothing then reads their bytes.

    A file that held them would be copied several times, and protobuf ends at 2 GB.
    """
    for number, name in enumerate(step.constants):
        value = graph.initializers.get(f"constant_{number}")
        if value is not None and value.const_value is not None and name in places:
            place, held = places[name], value.const_value
            value.const_value = ir.ExternalTensor(
                place.blob, place.offset, place.length, held.dtype,
                shape=ir.Shape(held.shape.numpy()), name=value.name or name,
            )  # fmt: skip
