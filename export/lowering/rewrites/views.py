"""Passes over the graph without arithmetic: copies, views, uninitialised memory."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SQUEEZES = (aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default)


def drop_copies(graph: fx.Graph) -> None:
    """Remove clones, and expansions that broadcasting makes unnecessary."""
    elementwise = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in outputs:
            continue
        if node.target is aten.clone.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.expand.default:
            source, shape = node.args[0], list(node.meta["val"].shape)
            if list(source.meta["val"].shape) == shape or all(
                user.target in elementwise
                and any(
                    n is not node and list(n.meta["val"].shape) == shape
                    for n in user.all_input_nodes
                )
                for user in node.users
            ):
                node.replace_all_uses_with(source)


def use_views(graph: fx.Graph) -> None:
    """Replace views and squeezes by ``view_copy``, with -1 for a single symbolic dimension.

    A view would be wrong after :func:`drop_copies`, since the strides may not allow it.
    """
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.target not in (*_VIEWS, *_SQUEEZES):
            continue
        source, shape = node.args[0], list(node.meta["val"].shape)
        symbolic = [i for i, n in enumerate(shape) if not isinstance(n, int)]
        if list(source.meta["val"].shape) == shape and node not in outputs:
            node.replace_all_uses_with(source)
        elif len(symbolic) <= 1:
            for i in symbolic:
                shape[i] = -1
            node.target, node.args = aten.view_copy.default, (source, shape)
        elif node.target in _VIEWS:  # its arguments compute the symbolic dimensions
            node.target = aten.view_copy.default


def fill(node: fx.Node) -> None:
    """Replace uninitialised memory by zeros: ExecuTorch has no kernel for ``new_empty_strided``."""
    if node.target is aten.new_empty_strided.default:
        dtype = node.meta["val"].dtype
        node.target, node.args, node.kwargs = aten.full.default, (node.args[1], 0), {"dtype": dtype}
