"""Simplifies a traced graph, for every runtime."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import GraphModule, Node

from export.torch_internals import without_repetition

aten = torch.ops.aten

_RENAMES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_SHAPED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def simplify(module: GraphModule) -> None:
    """Remove nodes that only rename a tensor, repeat another node, or are unused.

    A single symbolic size in the shape of a view becomes -1, so that it is not computed. A graph
    with a symbolic batch then has no shape arithmetic.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _RENAMES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in _SHAPED:
            _infer_one_size(node)
        elif node.target is aten.sym_numel.default:
            _multiply_sizes(node)
    module.graph.eliminate_dead_code()
    module.graph = without_repetition(module.graph)
    module.recompile()


def _infer_one_size(node: Node) -> None:
    shape = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
    if shape.count(-1) == 1:
        node.args = (node.args[0], shape)


def _multiply_sizes(node: Node) -> None:
    """Replace ``sym_numel`` by a product of ``sym_size``, which ONNX export can translate."""
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    shape = tensor.meta["val"].shape
    with node.graph.inserting_before(node):
        count: Node | int = math.prod(n for n in shape if isinstance(n, int))
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                factor = node.graph.call_function(aten.sym_size.int, (tensor, axis))
                factor.meta["val"] = size
                product = node.graph.call_function(operator.mul, (factor, count))
                product.meta["val"] = size * (
                    count if isinstance(count, int) else count.meta["val"]
                )
                count = product
    if isinstance(count, Node):
        node.replace_all_uses_with(count)
        node.graph.erase_node(node)
