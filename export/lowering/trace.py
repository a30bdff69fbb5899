"""Tracing: a functional step into an ``ExportedProgram`` with a symbolic batch dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.bundle import Port
from export.errors import ExportError
from export.lowering.decompositions import decompositions
from export.steps import Step

_HINT = 7
"""Batch size that stands in while tracing; a prime, so that it equals no width by accident."""

MAX_BATCH = 65_536


class _Traced(nn.Module):
    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.graph(*tensors)
        return result


def trace(step: Step) -> ExportedProgram:
    """Trace a step: forward, backward and update become one graph of core operators.

    Weights have fixed shapes and only the batch is symbolic, which keeps shape arithmetic out of
    the graph and tracing fast.

    Raises:
        ExportError: the step needs a fixed batch size.
    """
    shapes = ShapeEnv()
    symbol = shapes.create_symbol(
        _HINT, source=ConstantSource("batch"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
    )
    batch = shapes.create_symintnode(symbol, hint=_HINT)
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    # attention in terms of matrix products: the backward of its fused kernels has no translation
    with fake, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):
        graph = make_fx(step.function, decomposition_table=decompositions())(
            *(_empty(port, batch) for port in step.inputs)
        )
    if isinstance(shapes.replacements.get(symbol), int) or symbol in shapes.replacements:
        raise ExportError(
            "it fixes the batch size; use x.shape[0], not a number, len(x) or int(x.shape[0])"
        )
    _drop_aliases(graph)
    dimension = Dim("batch", min=1, max=MAX_BATCH)
    dynamic = tuple(
        {i: dimension for i, n in enumerate(port.spec.shape) if n == "batch"} or None
        for port in step.inputs
    )
    example = tuple(_empty(port, _HINT) for port in step.inputs)
    return torch.export.export(_Traced(graph), example, dynamic_shapes=(dynamic,))


def _empty(port: Port, batch: int | torch.SymInt) -> Tensor:
    shape: Sequence[int | torch.SymInt] = [
        batch if isinstance(n, str) else n for n in port.spec.shape
    ]
    return torch.zeros(shape, dtype=getattr(torch, port.spec.dtype))


def _drop_aliases(graph: torch.fx.GraphModule) -> None:
    """Remove nodes that only rename a tensor; detach leaves many."""
    renames = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in renames:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
