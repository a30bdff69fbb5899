"""Simplifications of a traced graph that hold for every runtime."""

from __future__ import annotations

import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_RENAMES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_SHAPED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def simplify(module: GraphModule) -> None:
    """Remove nodes that only rename a tensor, repeat another node, or are not used.

    A view whose shape has one symbolic size takes it as -1: then the size need not be computed,
    and a graph with a symbolic batch has no shape arithmetic left.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _RENAMES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in _SHAPED:
            _infer_one_size(node)
    module.graph.eliminate_dead_code()
    module.graph = fx_graph_cse(module.graph)
    module.recompile()


def _infer_one_size(node: Node) -> None:
    shape = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
    if shape.count(-1) == 1:
        node.args = (node.args[0], shape)
