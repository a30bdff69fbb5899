"""Fuses chains of operators for ONNX Runtime, which passes over memory once for every operator."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from export.lowering.rewrites.rule import replace
from export.torch_internals import GraphShapes

aten = torch.ops.aten


def fuse(module: GraphModule) -> None:
    """Replace ``x * scale + shift``, with a scale and a shift per channel, by a batch norm.

    A batch norm with mean 0 and variance 1 computes it in one pass. A channel is an index of the
    second dimension, or of all leading dimensions up to the second or a later one.
    """
    graph = module.graph
    shapes = GraphShapes(graph)
    for node in list(graph.nodes):
        terms = _terms(node)
        if terms is not None:
            replace(node, _affine, terms, {}, graph, shapes)
    graph.eliminate_dead_code()
    module.recompile()


def _terms(node: Node) -> tuple[Node, Node, Node] | None:
    """Tensor, scale and shift of a sum, if it is ``x * scale + shift`` per channel."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for product, shift in (node.args, node.args[::-1]):
        if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
            continue
        for x, scale in (product.args, product.args[::-1]):
            given = (x, scale, shift)
            if len(product.users) == 1 and all(isinstance(n, Node) for n in given):
                nodes = cast(tuple[Node, Node, Node], given)
                if _is_per_channel(*(n.meta["val"] for n in nodes)):
                    return nodes
    return None


def _is_per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether shapes are those of a tensor, and of a number for each of its channels."""
    if x.dtype != torch.float32 or x.dim() < 3 or not (x.dim() == scale.dim() == shift.dim()):
        return False
    if scale.shape != shift.shape or not all(isinstance(n, int) for n in x.shape[1:]):
        return False
    lasting = _lasting(x, scale)
    first = 1 if scale.shape[0] == 1 else 0
    return (
        1 < lasting < x.dim()
        and math.prod(x.shape[lasting:]) > 1
        and scale.shape[first:lasting] == x.shape[first:lasting]
    )


def _lasting(x: Tensor, scale: Tensor) -> int:
    """The number of leading dimensions that number the channels."""
    lasting = x.dim()
    while lasting > 0 and scale.shape[lasting - 1] == 1:
        lasting -= 1
    return lasting


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """``x * scale + shift`` as a batch norm."""
    rest = math.prod(x.shape[_lasting(x, scale) :])
    # with numbers for each row, every row has its own channels
    rows = x.reshape(-1, scale.numel(), rest) if scale.shape[0] == 1 else x.reshape(1, -1, rest)
    scale, shift = scale.reshape(-1), shift.reshape(-1)
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    y = aten._native_batch_norm_legit_no_training.default(
        rows, scale, shift, zeros, ones, 0.0, 0.0
    )[0]
    return y.reshape(-1, *x.shape[1:])
