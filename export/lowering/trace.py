"""Traces a functional step to an ``ExportedProgram`` with symbolic dimensions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.func import functionalize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu

from edge_sdk.bundle.manifest import Port
from export.cutting.seeded_random import check_operator
from export.errors import ExportError
from export.lowering.decompositions import decompositions
from export.lowering.guards import Shapes
from export.lowering.simplify import simplify
from export.steps.step import Step
from export.torch_internals import (
    SymbolicSizes,
    make_program,
    mutates,
    operators,
    trace_graph,
    without_collections,
    without_onednn,
)

_HINTS = (7, 5, 3)
"""Sizes of symbolic dimensions during tracing."""

MAX_SIZE = 65_536
"""Upper bound of a symbolic dimension for which a step has no limit."""


def trace(
    step: Step, further: Mapping[Any, Callable[..., Any]] = MappingProxyType({})
) -> ExportedProgram:
    """Trace forward pass, backward pass and update of a step as one graph of core operators.

    Only the named dimensions (``batch``, ``seq``) are symbolic, which keeps shape arithmetic out
    of the graph and tracing fast. The step's constants are buffers ``constant_0``,
    ``constant_1``, ... of the program, in their order.

    Args:
        step: step to trace.
        further: functions that replace operators beside :func:`decompositions`, by operator.

    Raises:
        ExportError: the step needs a fixed size of a symbolic dimension, decides on one, or has
            random numbers that are not drawn from the seed.
    """
    shapes = Shapes()
    names = sorted({n for port in step.inputs for n in port.spec.shape if isinstance(n, str)})
    largest = {name: max(step.limits.get(name, MAX_SIZE), 3) for name in names}
    symbolic = SymbolicSizes(
        {n: min(hint, largest[n]) for n, hint in zip(names, _HINTS, strict=False)}, largest, shapes
    )
    names_of_constants = list(step.constants)
    names_of_outputs = [port.spec.name for port in step.outputs]  # none: all outputs

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        constants = dict(zip(names_of_constants, tensors, strict=False))
        given = zip(step.inputs, tensors[len(constants) :], strict=True)
        outputs = step.function(constants, {port.spec.name: t for port, t in given})
        return tuple(outputs[name] for name in names_of_outputs or outputs)

    def inputs() -> list[Tensor]:
        constants = [torch.empty_like(tensor) for tensor in step.constants.values()]
        return constants + [_empty(port, symbolic.sizes) for port in step.inputs]

    table = {**decompositions(), **further}
    # attention as matrix products: the gradients of fused kernels have no translation
    backend = sdpa_kernel(SDPBackend.MATH)
    with without_collections(), symbolic.tracing(), backend, without_onednn(), one_gelu():
        graph = trace_graph(flat, inputs(), table)
        # running statistics and in-place activations
        if any(mutates(node) for node in graph.graph.nodes):
            pure = functionalize(graph, remove="mutations")
            graph = trace_graph(pure, inputs(), table)
    for name in symbolic.fixed():
        raise ExportError(_FIXED[name])
    for operator in operators(graph.graph):
        check_operator(operator)
    shapes.check_decisions(symbolic.names, largest)
    simplify(graph)
    return _program(graph, step.constants, symbolic.bound())


@contextmanager
def one_gelu() -> Iterator[None]:
    """Trace transformers' own formula of GELU with tanh as torch's, whose gradient is shorter.

    Verification compares the graph with the formula.
    """
    activations = sys.modules.get("transformers.activations")
    kind: Any = getattr(activations, "NewGELUActivation", None)
    if kind is None:  # no model can have one
        yield
        return
    formula = kind.forward
    kind.forward = lambda _, x: gelu(x, approximate="tanh")
    try:
        yield
    finally:
        kind.forward = formula


def _program(
    graph: torch.fx.GraphModule, constants: Mapping[str, Tensor], limits: dict[Any, Any]
) -> ExportedProgram:
    """Wrap a graph as an ``ExportedProgram``, with the constants as buffers."""
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
    return make_program(graph, inputs, outputs, tensors, lifted, limits)


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


_FIXED = {
    "batch": "it fixes the batch size; use x.shape[0], not a number, len(x) or int(x.shape[0])",
    "seq": "it fixes the length of the text; use x.shape[1], not a number or int(x.shape[1]); "
    "h.amax(2) or nn.AdaptiveMaxPool1d(1) in place of a pooling over the whole length; and no "
    "loop over the positions",
}


def _empty(port: Port, sizes: Mapping[str, int | torch.SymInt]) -> Tensor:
    shape = [sizes[n] if isinstance(n, str) else n for n in port.spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, port.spec.dtype))
