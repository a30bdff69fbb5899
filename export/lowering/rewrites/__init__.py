"""Rewrites a step graph to the operators that ExecuTorch accelerates with XNNPACK.

XNNPACK multiplies two computed matrices only as ``bmm`` or ``linear``, convolves only with constant
weights, slices only with a step of 1, reshapes with at most one symbolic dimension, and has neither
comparisons nor sums. All other operators run on portable kernels, which are 10 to 50 times slower.
A rule replaces an operator by operators that XNNPACK supports. It is a function of tensors with the
signature of that operator, and raises :class:`Declined` if it does not apply. All rules are exact
up to float32 rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument

from export.lowering.rewrites.convolutions import convolution
from export.lowering.rewrites.elementwise import erf, gelu, round_late, use_masks
from export.lowering.rewrites.products import addmm, mm, use_linear
from export.lowering.rewrites.rule import replace
from export.lowering.rewrites.slices import constant_pad_nd, slice_
from export.lowering.rewrites.sums import mean, sum_
from export.lowering.rewrites.views import drop_copies, fill, use_views
from export.torch_internals import GraphShapes, with_graph

aten = torch.ops.aten

RULES: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: mm,
    aten.addmm.default: addmm,
    aten.convolution.default: convolution,
    aten.constant_pad_nd.default: constant_pad_nd,
    aten.slice.Tensor: slice_,
    aten.sum.dim_IntList: sum_,
    aten.mean.dim: mean,
    aten.erf.default: erf,
    aten.gelu.default: gelu,
}


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """A copy of ``program`` with all rewrites applied; inputs, outputs and constants stay."""
    module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    graph = module.graph
    shapes = GraphShapes(graph)
    constants = _constants(program)
    drop_copies(graph)
    use_linear(graph, shapes)
    for node in list(graph.nodes):
        fill(node)
        use_masks(node, graph, shapes)
        round_late(node, graph, shapes)
    for node in list(graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None and not _native(node, constants):
            replace(node, rule, node.args, node.kwargs, graph, shapes)
    use_views(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return with_graph(program, module, _signature(program, graph))


def _signature(program: ExportedProgram, graph: fx.Graph) -> ExportGraphSignature:
    """The signature of ``program`` with the names of the output nodes of ``graph``."""
    signature = program.graph_signature
    nodes = cast(tuple[fx.Node, ...], graph.output_node().args[0])
    outputs = [
        dataclasses.replace(spec, arg=TensorArgument(name=node.name))
        for spec, node in zip(signature.output_specs, nodes, strict=True)
    ]
    return ExportGraphSignature(signature.input_specs, outputs)


def _constants(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that are constants, not inputs."""
    signature = program.graph_signature
    return {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }


def _native(node: fx.Node, constants: set[str]) -> bool:
    """Whether a node is a convolution with constant weight and bias, which XNNPACK supports."""
    if node.target is not aten.convolution.default:
        return False
    return all(n is None or cast(fx.Node, n).name in constants for n in node.args[1:3])
