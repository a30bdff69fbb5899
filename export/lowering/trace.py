"""Tracing: a functional step into an ``ExportedProgram`` with a symbolic batch dimension."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.bundle import Port
from export.errors import ExportError
from export.lowering.decompositions import decompositions
from export.lowering.simplify import simplify
from export.steps import Step

_HINTS = (7, 5, 3)
"""Sizes that stand in for symbolic dimensions while tracing."""

MAX_SIZE = 65_536
"""Limit of a symbolic dimension that has none of its own."""


class _Traced(nn.Module):
    """The traced graph with its constants, of which the exporter makes initializers."""

    def __init__(self, graph: torch.fx.GraphModule, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.traced = graph
        self._keys = [f"constant_{i}" for i in range(len(constants))]
        for key, tensor in zip(self._keys, constants.values(), strict=True):
            self.register_buffer(key, tensor)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        constants = (getattr(self, key) for key in self._keys)
        result: tuple[Tensor, ...] = self.traced(*constants, *tensors)
        return result


def trace(step: Step) -> ExportedProgram:
    """Trace a step: forward, backward and update become one graph of core operators.

    Weights have fixed shapes and only named dimensions (``batch``, ``seq``) are symbolic, which
    keeps shape arithmetic out of the graph and tracing fast. The step's constants are buffers
    ``constant_0``, ``constant_1``, ... of the program, in their order.

    Raises:
        ExportError: the step needs a fixed size of a symbolic dimension.
    """
    shapes = ShapeEnv()
    names = sorted({n for port in step.inputs for n in port.spec.shape if isinstance(n, str)})
    hints = dict(zip(names, _HINTS, strict=False))
    symbols, sizes = {}, {}
    for name, hint in hints.items():
        symbols[name] = shapes.create_symbol(
            hint, source=ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        sizes[name] = shapes.create_symintnode(symbols[name], hint=hint)
    names_of_constants = list(step.constants)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        constants = dict(zip(names_of_constants, tensors, strict=False))
        return step.function(constants, *tensors[len(constants) :])

    def inputs() -> list[Tensor]:
        constants = [torch.empty_like(tensor) for tensor in step.constants.values()]
        return constants + [_empty(port, sizes) for port in step.inputs]

    table = decompositions()
    table.pop(torch.ops.aten.squeeze.dim, None)
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    # attention in terms of matrix products: the backward of its fused kernels has no translation
    with fake, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):
        graph = make_fx(flat, decomposition_table=table)(*inputs())
        if any(_mutates(node) for node in graph.graph.nodes):  # running statistics, ReLU in place
            pure = functionalize(graph, remove="mutations")
            graph = make_fx(pure, decomposition_table=table)(*inputs())
    for name, symbol in symbols.items():
        if symbol in shapes.replacements:
            raise ExportError(_FIXED[name])
    simplify(graph)
    dimensions = {name: Dim(name, min=1, max=step.limits.get(name, MAX_SIZE)) for name in names}
    dynamic = tuple(
        {i: dimensions[n] for i, n in enumerate(port.spec.shape) if isinstance(n, str)} or None
        for port in step.inputs
    )
    example = tuple(_empty(port, hints) for port in step.inputs)
    return torch.export.export(_Traced(graph, step.constants), example, dynamic_shapes=(dynamic,))


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


_FIXED = {
    "batch": "it fixes the batch size; use x.shape[0], not a number, len(x) or int(x.shape[0])",
    "seq": "it fixes the length of the text; use x.shape[1], not a number or int(x.shape[1])",
}


def _empty(port: Port, sizes: Mapping[str, int | torch.SymInt]) -> Tensor:
    shape = [sizes[n] if isinstance(n, str) else n for n in port.spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, port.spec.dtype))
