"""Edits a random node of a traced graph or of an ONNX file, for the mutation suite."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx
from torch.export import ExportedProgram

Edit = str
"""What an edit did, and where."""


class Refused(Exception):
    """An edit does not apply to the chosen node."""


# traced graphs


def edit_program(
    program: ExportedProgram, rng: random.Random
) -> tuple[ExportedProgram, Edit] | None:
    """A copy of a traced program with one edit of a random node; None if none applies."""
    for _ in range(50):
        graph = copy.deepcopy(program.graph)
        nodes = [n for n in graph.nodes if n.op == "call_function" and _is_float(n)]
        node, (name, change) = rng.choice(nodes), rng.choice(list(_EDITS.items()))
        try:
            what = change(node, graph, rng)
        except Refused:
            continue
        graph.lint()
        edited = copy.copy(program)
        edited._graph_module = fx.GraphModule(program.graph_module, graph)
        return edited, f"{name}: {what} at {node.name} ({_target(node)})"
    return None


def _target(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape(node: fx.Node) -> list[str]:
    return [str(n) for n in node.meta["val"].shape]


def _swap_inputs(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    first, second = (*node.args, None, None)[:2]
    tensors = isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if not tensors or first is second or _target(node).startswith(("add", "mul", "max", "min")):
        raise Refused
    if not (_is_float(first) and _is_float(second)) or _shape(first) != _shape(second):
        raise Refused
    node.args = (second, first, *node.args[2:])
    return "two inputs swapped"


def _other_input(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    """Another tensor of the same shape and dtype that was computed before."""
    places = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _is_float(a)]
    if not places:
        raise Refused
    place = rng.choice(places)
    old = node.args[place]
    assert isinstance(old, fx.Node)
    known = []
    for other in graph.nodes:
        if other is node:
            break
        if other is not old and _is_float(other) and _shape(other) == _shape(old):
            known.append(other)
    if not known:
        raise Refused
    new = rng.choice(known)
    node.args = (*node.args[:place], new, *node.args[place + 1 :])
    return f"{old.name} replaced by {new.name}"


def _drop(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    """The node's result is one of its inputs."""
    alike = [
        a for a in node.args
        if isinstance(a, fx.Node) and _is_float(a) and _shape(a) == _shape(node)
    ]  # fmt: skip
    if not alike or not node.users:
        raise Refused
    node.replace_all_uses_with(rng.choice(alike))
    return "the operation is left out"


def _attribute(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    """A number is 1 % larger, a switch is turned, or the order of axes is another."""
    places = [
        i for i, a in enumerate(node.args)
        if isinstance(a, bool | float) or (isinstance(a, list) and len(set(a)) > 1)
    ]  # fmt: skip
    if not places:
        raise Refused
    place = rng.choice(places)
    old = node.args[place]
    new: Any
    if isinstance(old, bool):
        new = not old
    elif isinstance(old, float):
        new = old * 1.01 if old else 0.01
    else:
        sizes = _shape(node)
        i, j = rng.sample(range(len(old)), 2)
        if _target(node).startswith("permute") and sizes[i] != sizes[j]:
            raise Refused
        if not _target(node).startswith("permute"):
            raise Refused
        new = list(old)
        new[i], new[j] = new[j], new[i]
    node.args = (*node.args[:place], new, *node.args[place + 1 :])
    return f"argument {place} is {new}, not {old}"


def _insert(node: fx.Node, graph: fx.Graph, function: Callable[..., Tensor], *args: Any) -> None:
    if not node.users:
        raise Refused
    with graph.inserting_after(node):
        wrong = graph.call_function(function, (node, *args))
    wrong.meta = dict(node.meta)
    node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)


def _scale(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    _insert(node, graph, torch.mul, 1.01)
    return "scaled by 1.01"


def _sign(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    _insert(node, graph, torch.neg)
    return "the sign is another"


def _channel(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    shape = node.meta["val"].shape
    axes = [i for i, n in enumerate(shape) if isinstance(n, int) and n > 1]
    if not axes:
        raise Refused
    axis = rng.choice(axes)
    index = rng.randrange(shape[axis])
    _insert(node, graph, _scaled_channel, axis, index)
    return f"index {index} of axis {axis} scaled by 1.01"


def _scaled_channel(x: Tensor, axis: int, index: int) -> Tensor:
    factors = torch.ones(x.shape[axis], dtype=x.dtype)
    factors[index] = 1.01
    return x * factors.reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _half(node: fx.Node, graph: fx.Graph, rng: random.Random) -> str:
    shape = node.meta["val"].shape
    if not shape or isinstance(shape[0], int):
        raise Refused
    _insert(node, graph, _wrong_half)
    return "the second half of the batch scaled by 1.01"


def _wrong_half(x: Tensor) -> Tensor:
    factors = torch.ones(len(x), dtype=x.dtype)
    factors[len(x) // 2 :] = 1.01
    return x * factors.reshape(-1, *[1] * (x.dim() - 1))


_EDITS: dict[str, Callable[[fx.Node, fx.Graph, random.Random], str]] = {
    "swap": _swap_inputs,
    "input": _other_input,
    "drop": _drop,
    "attribute": _attribute,
    "scale": _scale,
    "sign": _sign,
    "channel": _channel,
    "half": _half,
}


# ONNX files

_OTHER = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "Relu": "LeakyRelu",
    "ReduceSum": "ReduceMean",
    "ReduceMean": "ReduceSum",
    "ReduceMax": "ReduceMin",
    "Sqrt": "Exp",
    "Tanh": "Sigmoid",
    "Sigmoid": "Tanh",
    "Erf": "Tanh",
    "Greater": "Less",
    "Less": "Greater",
    "LessOrEqual": "GreaterOrEqual",
    "GreaterOrEqual": "LessOrEqual",
    "Round": "Floor",
}


def edit_file(data: bytes, rng: random.Random) -> tuple[bytes, Edit] | None:
    """An ONNX file with one edit of a random node or constant; None if none applies."""
    for _ in range(50):
        model = onnx.load_model_from_string(data)
        name, change = rng.choice(list(_FILE_EDITS.items()))
        try:
            what = change(model.graph, rng)
        except Refused:
            continue
        return model.SerializeToString(), f"{name}: {what}"
    return None


def _node(graph: onnx.GraphProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(list(graph.node))


def _file_swap(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = _node(graph, rng)
    if node.op_type not in ("Sub", "Div", "MatMul", "Less", "Greater", "Pow", "Where"):
        raise Refused
    i, j = (1, 2) if node.op_type == "Where" else (0, 1)
    node.input[i], node.input[j] = node.input[j], node.input[i]
    return f"inputs of {node.op_type} {node.output[0]} swapped"


def _file_operator(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = _node(graph, rng)
    if node.op_type not in _OTHER:
        raise Refused
    old, node.op_type = node.op_type, _OTHER[node.op_type]
    return f"{old} {node.output[0]} is {node.op_type}"


def _file_drop(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = _node(graph, rng)
    if node.op_type not in ("Add", "Mul", "Relu", "Round", "Clip", "Sub", "Sqrt", "Neg"):
        raise Refused
    old, node.op_type = node.op_type, "Identity"
    del node.input[1:], node.attribute[:]
    return f"{old} {node.output[0]} is left out"


def _file_attribute(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = _node(graph, rng)
    floats = [a for a in node.attribute if a.type == onnx.AttributeProto.FLOAT and a.f]
    if not floats:
        raise Refused
    attribute = rng.choice(floats)
    attribute.f *= 1.01 if attribute.f > 1e-3 else 10
    return f"{attribute.name} of {node.op_type} {node.output[0]} is {attribute.f:.3g}"


def _file_constant(graph: onnx.GraphProto, rng: random.Random) -> str:
    floats = [
        t for t in graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and np.any(numpy_helper.to_array(t))
    ]  # fmt: skip
    if not floats:
        raise Refused
    tensor = rng.choice(floats)
    values = numpy_helper.to_array(tensor).copy()
    if values.ndim and len(values) > 1 and rng.random() < 0.5:
        index = rng.randrange(len(values))
        values[index] *= 1.01
        what = f"row {index} of {tensor.name} scaled by 1.01"
    else:
        values = values * np.float32(1.01)
        what = f"{tensor.name} scaled by 1.01"
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return what


def _file_scale(graph: onnx.GraphProto, rng: random.Random) -> str:
    """A float output of a node is scaled; the type check of the runtime refuses integers."""
    node = _node(graph, rng)
    if node.op_type not in (
        "Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Conv", "ReduceSum", "ReduceMean", "Softmax",
        "LayerNormalization", "Sqrt", "Reciprocal", "Where", "Transpose", "Tanh", "Erf",
    ):  # fmt: skip
        raise Refused
    name = node.output[0]
    node.output[0] = f"{name}/right"
    graph.initializer.append(numpy_helper.from_array(np.array(1.01, np.float32), f"{name}/factor"))
    place = list(graph.node).index(node) + 1
    graph.node.insert(
        place, onnx.helper.make_node("Mul", [f"{name}/right", f"{name}/factor"], [name])
    )
    return f"{node.op_type} {name} scaled by 1.01"


_FILE_EDITS: dict[str, Callable[[onnx.GraphProto, random.Random], str]] = {
    "swap": _file_swap,
    "operator": _file_operator,
    "drop": _file_drop,
    "attribute": _file_attribute,
    "constant": _file_constant,
    "scale": _file_scale,
}
