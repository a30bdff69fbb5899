"""Traces a functional step to an ``ExportedProgram`` with symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_structure
from torch.utils._sympy.value_ranges import ValueRanges

from edge_sdk.bundle.manifest import Port
from export.errors import ExportError
from export.lowering.decompositions import decompositions
from export.lowering.onednn import without_onednn
from export.lowering.simplify import simplify
from export.steps.step import Step

_HINTS = (7, 5, 3)
"""Sizes of symbolic dimensions during tracing."""

MAX_SIZE = 65_536
"""Upper bound of a symbolic dimension for which a step has no limit."""


def trace(step: Step) -> ExportedProgram:
    """Trace forward pass, backward pass and update of a step as one graph of core operators.

    Only the named dimensions (``batch``, ``seq``) are symbolic, which keeps shape arithmetic out
    of the graph and tracing fast. The step's constants are buffers ``constant_0``,
    ``constant_1``, ... of the program, in their order.

    Raises:
        ExportError: the step needs a fixed size of a symbolic dimension.
    """
    shapes = ShapeEnv()
    names = sorted({n for port in step.inputs for n in port.spec.shape if isinstance(n, str)})
    # torch specialises sizes of 1 and 2 in some places
    largest = {name: max(step.limits.get(name, MAX_SIZE), 3) for name in names}
    hints = {n: min(hint, largest[n]) for n, hint in zip(names, _HINTS, strict=False)}
    symbols, sizes = {}, {}
    for name, hint in hints.items():
        symbols[name] = shapes.create_symbol(
            hint, source=ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        sizes[name] = shapes.create_symintnode(symbols[name], hint=hint)
    names_of_constants = list(step.constants)
    names_of_outputs = [port.spec.name for port in step.outputs]  # none: all outputs

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        constants = dict(zip(names_of_constants, tensors, strict=False))
        given = zip(step.inputs, tensors[len(constants) :], strict=True)
        outputs = step.function(constants, {port.spec.name: t for port, t in given})
        return tuple(outputs[name] for name in names_of_outputs or outputs)

    def inputs() -> list[Tensor]:
        constants = [torch.empty_like(tensor) for tensor in step.constants.values()]
        return constants + [_empty(port, sizes) for port in step.inputs]

    table = decompositions()
    fake = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    # attention as matrix products: the gradients of fused kernels have no translation
    with fake, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH), without_onednn():
        graph = make_fx(flat, decomposition_table=table)(*inputs())
        # running statistics and in-place activations
        if any(_mutates(node) for node in graph.graph.nodes):
            pure = functionalize(graph, remove="mutations")
            graph = make_fx(pure, decomposition_table=table)(*inputs())
    for name, symbol in symbols.items():
        if symbol in shapes.replacements:
            raise ExportError(_FIXED[name])
    simplify(graph)
    limits = {symbols[n]: ValueRanges(1, largest[n]) for n in names}
    shapes.var_to_range.update(limits)  # ExecuTorch plans memory by these bounds
    return _program(graph, step.constants, limits)


def _program(
    graph: torch.fx.GraphModule, constants: Mapping[str, Tensor], limits: dict[Any, Any]
) -> ExportedProgram:
    """Wrap a graph as an ``ExportedProgram``.

    ``torch.export.export`` would trace the graph again, which takes as long as the first trace.
    """
    tensors = {f"constant_{i}": tensor for i, tensor in enumerate(constants.values())}
    lifted = _lift(graph, after=len(tensors))
    places = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    kinds: list[tuple[InputKind, str | None]] = [(InputKind.BUFFER, name) for name in tensors]
    kinds += [(InputKind.CONSTANT_TENSOR, name) for name in lifted]
    kinds += [(InputKind.USER_INPUT, None) for _ in places[len(kinds) :]]
    inputs = [
        InputSpec(kind, TensorArgument(place), target, kind is InputKind.BUFFER or None)
        for place, (kind, target) in zip(places, kinds, strict=True)
    ]
    results = cast(Sequence[torch.fx.Node], graph.graph.output_node().args[0])
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(r.name), None) for r in results]
    given = tuple(range(len(inputs) - len(tensors) - len(lifted)))
    signature = ModuleCallSignature(
        [], [], tree_structure((given, {})), tree_structure(tuple(results))
    )
    return ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=tensors,
        range_constraints=limits,
        module_call_graph=[ModuleCallEntry("", signature)],
        constants=dict(lifted),
    )


def _lift(module: torch.fx.GraphModule, after: int) -> dict[str, Tensor]:
    """Turn tensors that the traced code creates (``torch.tensor([0, 2])``) into inputs."""
    graph = module.graph
    lifted: dict[str, Tensor] = {}
    first = [node for node in graph.nodes if node.op == "placeholder"][after]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        with graph.inserting_before(first):
            place = graph.placeholder(f"lifted_{len(lifted)}")
        place.meta = dict(node.meta)
        lifted[place.name] = getattr(module, str(node.target))
        node.replace_all_uses_with(place)
        graph.erase_node(node)
    return lifted


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


_FIXED = {
    "batch": "it fixes the batch size; use x.shape[0], not a number, len(x) or int(x.shape[0])",
    "seq": "it fixes the length of the text; use x.shape[1], not a number or int(x.shape[1])",
}


def _empty(port: Port, sizes: Mapping[str, int | torch.SymInt]) -> Tensor:
    shape = [sizes[n] if isinstance(n, str) else n for n in port.spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, port.spec.dtype))
