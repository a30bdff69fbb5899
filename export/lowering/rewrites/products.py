"""Matrix products, as batched products or linear layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from export.lowering.rewrites.groups import groups_of
from export.lowering.rewrites.rule import replace
from export.torch_internals import GraphShapes

aten = torch.ops.aten


def mm(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product as a batched product, with a batch for each group of many terms."""
    groups = groups_of(a.shape[1])
    if groups == 1:
        return torch.bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze((0,))
    rows, terms, columns = *a.shape, b.shape[1]
    parts = torch.bmm(
        a.reshape(rows, groups, terms // groups).permute(1, 0, 2),
        b.reshape(groups, terms // groups, columns),
    )
    ones = torch.full((1, 1, groups), 1.0, device=a.device)
    return torch.bmm(ones, parts.reshape(1, groups, rows * columns)).reshape(rows, columns)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A matrix product as a batched product with one batch, and an addition."""
    product = mm(a, b)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


def use_linear(graph: fx.Graph, shapes: GraphShapes) -> None:
    """Replace ``mm`` and ``addmm`` with a transposed second factor by ``linear``.

    A factor that was transposed twice is taken as it was.
    """
    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        while _is_transposed(b) and _is_transposed(b.args[0]):
            b = b.args[0].args[0]
            node.update_arg(len(node.args) - 1, b)
        vector = all(n.meta["val"].shape == node.meta["val"].shape[1:] for n in bias)
        if vector and _is_transposed(b):
            replace(node, aten.linear.default, (a, b.args[0], *bias), {}, graph, shapes)


def _is_transposed(node: fx.Node) -> bool:
    return node.target is aten.permute.default and list(cast(Any, node.args[1])) == [1, 0]
