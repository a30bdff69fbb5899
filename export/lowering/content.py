"""The content of a traced step as a hash: equal hashes are lowered to equal files.

A hash covers the operators with their arguments, the shapes and dtypes of their results, the names
that a file repeats, the ports, and the values of constants. The code of a model is not hashed:
functions that it calls, global variables and closures would be missing. The trace shows what they
have computed.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from export.lowering.export_cache import digest
from export.steps.step import Step
from export.torch_internals import is_operator


class NoContent(Exception):
    """A program has something whose content is not known here."""


def step_digest(
    step: Step, program: ExportedProgram, stored: Mapping[str, object], known: dict[int, str]
) -> str | None:
    """Hash of a traced step; None if it has something whose content is not known.

    Args:
        step: the step.
        program: its traced program.
        stored: what stands for constants that are stored elsewhere under their hash, by name.
        known: hashes of tensors by ``id``, which this function adds to. Steps share constants.
    """
    parts = [step.name, repr(step.inputs), repr(step.outputs), repr(dict(step.limits))]
    parts += [str(program.graph_signature), str(program.range_constraints)]
    try:
        parts += [_node(node) for node in program.graph.nodes]
        for name, tensor in step.constants.items():
            parts += [name, repr(stored[name]) if name in stored else _tensor(tensor, known)]
        for name, constant in program.constants.items():
            parts += [name, _tensor(constant, {})]
    except NoContent:
        return None
    return digest(*parts)


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors with their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().contiguous().reshape(-1)
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _tensor(tensor: object, known: dict[int, str]) -> str:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        raise NoContent
    if id(tensor) not in known:
        known[id(tensor)] = tensor_digest({"": tensor})
    return known[id(tensor)]


def _node(node: fx.Node) -> str:
    if node.op not in ("placeholder", "call_function", "output"):
        raise NoContent
    given = _value(node.args), _value(dict(node.kwargs))
    said = f"{node.name} = {node.op} {_target(node.target)} {given}"
    return f"{said} : {_result(node.meta.get('val'))}"


def _target(target: Any) -> str:
    if isinstance(target, str) or is_operator(target):
        return str(target)
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:  # arithmetic of sizes
        return f"operator.{name}"
    raise NoContent


_PLAIN = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def _value(value: Any) -> str:
    """An argument of a node."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_value(value[name])}' for name in sorted(value))}}}"
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    raise NoContent


def _result(value: Any) -> str:
    """The shape and dtype of a node's result."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {list(value.stride())} {value.device}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_result, value))}]"
    return str(value)
